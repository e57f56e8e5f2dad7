from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data import Examples, Files, View, threads
from fahooks.data.threads import ThreadedStream, own_cores


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Thirteen black images."""
    paths = [str(tmp_path / f"{number}.png") for number in range(13)]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    return Files(paths, torch.arange(13), side=16)


def opened(files: Files, *, batch_size: int, workers: int) -> ThreadedStream:
    view = View(batch_size=batch_size, training=True, mean=torch.zeros(3), std=torch.ones(3))
    return ThreadedStream(Examples("x", files, torch.arange(13)), view, workers=workers)


def test_no_more_is_decoded_ahead_than_there_are_workers(files: Files, monkeypatch: pytest.MonkeyPatch):
    stream = opened(files, batch_size=1, workers=2)
    loaded: list[int] = []
    inner = stream._load
    monkeypatch.setattr(stream, "_load", lambda *args: loaded.append(1) or inner(*args))
    batches = iter(stream)
    next(batches)
    next(batches)
    assert len(loaded) <= 2 + 2
    assert len(list(batches)) == 11


def test_threads_end_with_the_epoch_and_with_who_stops_early(files: Files):
    stream = opened(files, batch_size=4, workers=3)
    before = threading.active_count()
    for _ in stream:
        assert threading.active_count() > before
        break
    assert threading.active_count() == before
    list(stream)
    assert threading.active_count() == before


def test_workers_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert own_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own_cores() == 1
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(512)), raising=False)
    assert own_cores() == 16
