from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fahooks.data import Augment, Batch, Examples, Files, Images, MemoryLoader, TorchvisionLoader, View
from fahooks.plugins import InputError

AUGMENTS = [
    [],
    [{"crop": {"padding": 4}}, {"flip": {}}, {"cutout": {"size": 5}}],
    [{"random_resized_crop": {"size": 12}}, {"flip": {}}],
    [{"center_crop": {"size": 12, "resize": 14}}],
]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Thirteen images of as many sizes."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(13):
        pixels = torch.randint(0, 256, (20 + number, 40 - number, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    return Files(paths, torch.arange(13), side=16)


def view(**options: Any) -> View:
    return View(**{"batch_size": 4, "training": True, "mean": torch.zeros(3), "std": torch.ones(3), "seed": 7, **options})


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for name in ("images", "labels", "index", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.count == other.count


@pytest.mark.parametrize("steps", AUGMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_it_gives_what_the_memory_loader_gives_whatever_the_workers(files: Files, steps: list[Any], training: bool):
    examples = Examples("x", files, torch.tensor([12, 3, 5, 7, 0, 1, 2, 9, 11]))
    seen = view(augment=Augment(steps, seed=2), training=training)
    expected = list(MemoryLoader().open(examples, seen))
    for workers in (1, 3):
        assert_same(list(TorchvisionLoader(workers=workers).open(examples, seen)), expected)


def test_it_feeds_arrays_too():
    images = Images(torch.arange(13 * 48).byte().view(13, 3, 4, 4), torch.arange(13))
    examples = Examples("x", images, torch.arange(12, -1, -1))
    for steps in ([{"crop": {"padding": 1}}], [{"random_resized_crop": {"size": 3}}]):
        seen = view(augment=Augment(steps))
        assert_same(list(TorchvisionLoader(workers=2).open(examples, seen)), list(MemoryLoader().open(examples, seen)))


def test_workers_must_be_positive():
    with pytest.raises(InputError, match="workers must be positive .got 0."):
        TorchvisionLoader(workers=0)
