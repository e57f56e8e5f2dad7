from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fahooks.data.augmentation import Augment, Augmentation, Draw
from fahooks.plugins import InputError, UnknownName, augmentations

INDEX = torch.arange(4000)
CROP = {"crop": {"size": 5, "padding": 1}}
FLIP = {"flip": {}}


def images(count: int = 8, height: int = 6, width: int = 7) -> Tensor:
    """No two pixels of an image are alike, and none is black."""
    return (torch.arange(count * 2 * height * width) % 251 + 1).byte().view(count, 2, height, width)


def drawn(count: int, *key: str | int, index: Tensor = INDEX) -> Tensor:
    return Draw(index, ("test",)).below(count, *key)


# Numbers.


def test_splitmix64_is_that_of_its_authors():
    """The first outputs of the reference implementation in C (https://prng.di.unimi.it/splitmix64.c) for state 1234567."""
    from fahooks.data import augmentation

    states = torch.tensor([1234567]) + augmentation._GOLDEN * torch.arange(1, 4)
    outputs = [value % 2**64 for value in augmentation._splitmix64(states).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("count", [2, 3, 9, 1000])
def test_numbers_are_uniform(count: int):
    found = torch.bincount(drawn(count) // max(1, count // 10))
    expected = torch.bincount(torch.arange(count) // max(1, count // 10)) * len(INDEX) / count
    # Pearson's chi-squared has mean k - 1 and variance 2 (k - 1).
    freedom = len(found) - 1
    assert ((found - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
    assert drawn(count).min() >= 0 and drawn(count).max() < count


def test_numbers_of_different_keys_and_of_neighbours_are_independent():
    first, second = drawn(1000, "row").double(), drawn(1000, "column").double()
    pairs = [(first, second), (first[1:], first[:-1]), (first, Draw(INDEX, ("test", 1)).below(1000, "row").double())]
    for one, other in pairs:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / len(INDEX) ** 0.5
    assert torch.equal(first, drawn(1000, "row").double()), "control: equal keys give equal numbers"


@given(st.integers(1, 2**31), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_numbers_are_in_range_for_any_index(count: int, index: list[int]):
    numbers = drawn(count, index=torch.tensor(index))
    assert (numbers >= 0).all() and (numbers < count).all()


# Steps.


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99), st.data())
def test_a_crop_is_a_window_of_the_padded_image(height: int, width: int, padding: int, epoch: int, data: st.DataObject):
    size = data.draw(st.integers(1, min(height, width) + 2 * padding))
    pixels = images(3, height, width)
    cropped = Augment([{"crop": {"size": size, "padding": padding}}]).train(pixels, epoch, torch.arange(3))
    assert cropped.shape == (3, 2, size, size) and cropped.dtype == torch.uint8
    padded = torch.zeros(3, 2, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = pixels
    places = [(y, x) for y in range(padded.shape[2] - size + 1) for x in range(padded.shape[3] - size + 1)]
    for whole, window in zip(padded, cropped, strict=True):
        assert any(torch.equal(whole[:, y : y + size, x : x + size], window) for y, x in places)


def test_all_windows_are_equally_likely_and_drawn_for_rows_and_columns_alone():
    row = torch.arange(6).byte()
    pixels = torch.stack([row[:, None].expand(6, 6), row.expand(6, 6)]).expand(len(INDEX), 2, 6, 6)
    corners = Augment([{"crop": {"size": 4}}]).train(pixels, 0, INDEX)[:, :, 0, 0]
    counts = torch.bincount(corners[:, 0].long() * 3 + corners[:, 1], minlength=9)
    assert len(counts) == 9
    assert ((counts - len(INDEX) / 9).abs() < 5 * (len(INDEX) / 9) ** 0.5).all()


def test_a_crop_without_a_size_keeps_that_of_the_image():
    augment = Augment([{"crop": {"padding": 2}}])
    assert augment.shape((2, 6, 7)) == (2, 6, 7)
    moved = augment.train(images(), 0, torch.arange(8))
    assert moved.shape == images().shape and not torch.equal(moved, images())
    assert (moved == 0).any(), "black comes in at the sides"


def test_half_of_the_images_are_mirrored():
    pixels = images(1).expand(len(INDEX), -1, -1, -1)
    flipped = Augment([FLIP]).train(pixels, 0, INDEX)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(1)
    assert torch.equal(mirrored, (flipped != pixels).flatten(1).any(1))
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / len(INDEX) ** 0.5


def test_images_are_evaluated_without_chance_and_in_their_centre():
    pixels = images()
    assert torch.equal(Augment([{"crop": {"size": 4}}, FLIP]).evaluate(pixels), pixels[:, :, 1:5, 1:5])
    assert torch.equal(Augment([{"crop": {"padding": 3}}]).evaluate(pixels), pixels)
    assert torch.equal(Augment([{"crop": {"size": 4, "padding": 2}}]).evaluate(pixels), pixels[:, :, 1:5, 1:5])
    assert torch.equal(Augment([FLIP]).evaluate(pixels), pixels)
    assert Augment([CROP, FLIP]).shape((2, 6, 7)) == (2, 5, 5) == Augment([CROP, FLIP]).evaluate(pixels).shape[1:]


# The whole.


def test_what_an_image_becomes_is_a_pure_function_of_seed_epoch_and_index():
    pixels = images(64)
    index = torch.arange(100, 164)
    augment = Augment([CROP, FLIP], seed=3)
    before = torch.get_rng_state()
    once = augment.train(pixels, 7, index)
    torch.manual_seed(1)
    assert torch.equal(augment.train(pixels, 7, index), once)
    assert torch.equal(Augment([CROP, FLIP], seed=3).train(pixels, 7, index), once)
    for other in (augment.train(pixels, 8, index), Augment([CROP, FLIP], seed=4).train(pixels, 7, index)):
        assert not torch.equal(other, once)
    assert not torch.equal(augment.train(pixels, 7, index + 1), once)
    torch.set_rng_state(before)
    augment.train(pixels, 7, index)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.permutations(range(12)), st.integers(1, 12))
def test_it_is_the_same_whatever_the_batch(order: list[int], batch_size: int):
    pixels, index = images(12), torch.tensor(order)
    augment = Augment([CROP, FLIP])
    together = augment.train(pixels, 1, torch.arange(12))
    apart = torch.cat([augment.train(pixels[part], 1, part) for part in index.split(batch_size)])
    assert torch.equal(apart, together[index])


def test_two_steps_of_a_kind_draw_their_own_numbers():
    pixels = images(64)
    twice = Augment([FLIP, FLIP]).train(pixels, 0, torch.arange(64))
    assert not torch.equal(twice, pixels), "the second would undo the first"


def test_nothing_to_do_leaves_images_as_they_are():
    assert Augment().train(images(), 0, torch.arange(8)).equal(images())
    assert Augment().shape((1, 2, 3)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs size, padding or both"),
        ({"padding": -1}, "padding must not be negative .got -1."),
        ({"size": 0}, "size must be positive .got 0."),
    ],
)
def test_a_crop_that_makes_no_sense_is_refused(options: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        Augment([{"crop": options}])


def test_windows_larger_than_the_image_are_refused():
    with pytest.raises(InputError, match="10x10 pixels does not fit into images of 6x7 with padding 1"):
        Augment([{"crop": {"size": 10, "padding": 1}}]).shape((3, 6, 7))
    assert Augment([{"crop": {"size": 8, "padding": 1}}]).shape((3, 6, 7)) == (3, 8, 8)


def test_an_unknown_step_or_option_is_named():
    with pytest.raises(UnknownName, match="no augmentation is named 'corp' - did you mean 'crop'"):
        Augment([{"corp": {}}])
    with pytest.raises(InputError, match="augmentation 'crop' has no option 'sice' - did you mean 'size'"):
        Augment([{"crop": {"sice": 3}}])


def test_a_plugin_adds_a_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(augmentations, "_entries", dict(augmentations._entries))

    @augmentations.register("darken")
    class Darken(Augmentation):
        """Shift right by a few bits."""

        def __init__(self, *, most: int = 3) -> None:
            self.most = most

        def train(self, pixels: Tensor, draw: Draw) -> Tensor:
            return pixels >> draw.below(self.most + 1, "bits").byte()[:, None, None, None]

    darkened = Augment([{"darken": {"most": 1}}]).train(images(64), 0, torch.arange(64))
    halved = (darkened == images(64) >> 1).flatten(1).all(1)
    assert 0 < halved.sum() < 64
    assert torch.equal(darkened[~halved], images(64)[~halved])
