from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data import Files, Images, room
from fahooks.data.framing import CenterCrop, RandomResizedCrop
from fahooks.data.room import decoded_bytes, free_bytes

IMAGES = Images(torch.zeros(5, 3, 8, 9, dtype=torch.uint8), torch.zeros(5).long())


def test_images_take_what_they_are_or_what_is_cut_out_of_them():
    assert decoded_bytes(IMAGES, None, 5, whole=False) == IMAGES.pixels.nbytes
    assert decoded_bytes(IMAGES, CenterCrop(size=4), 5, whole=False) == 5 * 3 * 4 * 4
    assert decoded_bytes(IMAGES, RandomResizedCrop(size=4), 5, whole=True) == IMAGES.pixels.nbytes


def test_whole_files_are_estimated_from_their_headers(tmp_path: Path):
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("RGB", (10, 10 + number)).save(path)
    Path(paths[3]).write_bytes(b"damaged")
    files = Files(paths, torch.arange(4), side=5)
    assert decoded_bytes(files, files.framing, 8, whole=False) == 8 * 3 * 25
    assert decoded_bytes(files, RandomResizedCrop(size=4), 8, whole=True) == 8 * 3 * 110


def test_the_free_memory_of_this_machine_is_known():
    import os

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**26 < free_bytes() <= total


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch):
    limits = {"memory.max": 5000, "memory.current": 3000}
    monkeypatch.setattr(room, "_number", limits.get)
    assert free_bytes() == 2000
    monkeypatch.setattr(room, "_number", lambda _: None)
    assert free_bytes() > 2**20
