from __future__ import annotations

import pytest
import torch

from fahooks.data import Dataset, Images
from fahooks.data.split import split
from fahooks.plugins import InputError


def numbered(count: int, start: int) -> Images:
    """Images whose label is their number."""
    labels = torch.arange(start, start + count)
    return Images(labels.remainder(256).byte().view(-1, 1, 1, 1), labels)


DATASET = Dataset("numbers", numbered(100, 0), numbered(20, 1000), classes=10)


@pytest.mark.parametrize(
    ("validation", "limit", "sizes"), [(30, None, (70, 30)), (0.25, None, (75, 25)), (0.2, 50, (40, 10)), (5, 400, (95, 5))]
)
def test_validation_is_taken_from_the_training_images_alone(validation: int | float, limit: int | None, sizes: tuple[int, int]):
    parts = split(DATASET, validation=validation, limit=limit, seed=0)
    train, held_out = set(parts.train.labels.tolist()), set(parts.validation.labels.tolist())
    assert (len(train), len(held_out)) == (len(parts.train), len(parts.validation)) == sizes
    assert not train & held_out
    assert train | held_out <= set(range(100))
    assert torch.equal(parts.test.labels, DATASET.test.labels)


def test_the_seed_decides_which():
    first, again, other = (split(DATASET, validation=30, limit=None, seed=s).validation.labels for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert set(first.tolist()) != set(other.tolist())


def test_images_keep_their_labels():
    parts = split(DATASET, validation=30, limit=None, seed=0)
    read = torch.cat([parts.train.read(place).flatten() for place in range(len(parts.train))])
    assert torch.equal(read, parts.train.labels.byte())


@pytest.mark.parametrize(("validation", "limit"), [(100, None), (200, None), (0.001, None), (50, 50), (0.9999, None)])
def test_an_empty_side_is_refused(validation: int | float, limit: int | None):
    with pytest.raises(
        InputError, match=f"data.validation={validation} takes .* of the {limit or 100} training images of numbers"
    ):
        split(DATASET, validation=validation, limit=limit, seed=0)
