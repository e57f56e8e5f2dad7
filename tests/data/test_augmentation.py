from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fahooks.data import Augment, Augmentation, Draw
from fahooks.data.augmentation import Crop, Cutout, Flip
from fahooks.plugins import InputError, UnknownName, augmentations

INDEX = torch.arange(4000)
CROP = {"crop": {"size": 5, "padding": 1}}
FLIP = {"flip": {}}


def images(count: int = 8, height: int = 6, width: int = 7) -> Tensor:
    """No two pixels of an image are alike, and none is black."""
    return (torch.arange(count * 2 * height * width) % 251 + 1).byte().view(count, 2, height, width)


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


def test_cutout_paints_one_square_over():
    pixels = images(200)
    painted = Augment([{"cutout": {"size": 3, "fill": 0}}]).train(pixels, 0, torch.arange(200))
    assert painted.dtype == torch.uint8
    sizes: set[tuple[int, int]] = set()
    for before, after in zip(pixels, painted, strict=True):
        rows, columns = ((after == 0).all(0).any(along).nonzero().flatten() for along in (1, 0))
        top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        expected = before.clone()
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(after, expected), "a full rectangle, and nothing outside"
        sizes.add((int(bottom - top), int(right - left)))
    assert sizes == {(h, w) for h in (2, 3) for w in (2, 3)}, "whole inside, and cut where the centre lies at the edge"


def test_every_pixel_is_the_centre_of_a_cutout_equally_often():
    pixels = torch.full((4000, 1, 6, 7), 9, dtype=torch.uint8)
    painted = Augment([{"cutout": {"size": 1, "fill": 255}}]).train(pixels, 0, INDEX)
    counts = (painted == 255).sum((0, 1))
    assert counts.sum() == 4000 and ((counts - 4000 / 42).abs() < 5 * (4000 / 42) ** 0.5).all()
    assert torch.equal(Augment([{"cutout": {"size": 1}}]).evaluate(pixels), pixels)


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 0}, "size must be positive .got 0."), ({"size": 2, "fill": 256}, "0 to 255 .got 256.")]
)
def test_a_cutout_that_makes_no_sense_is_refused(options: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        Augment([{"cutout": options}])


def test_what_steps_draw_can_be_asked_for_alone():
    """A loader that crops, mirrors and paints while it decodes gets the numbers that the steps use."""
    pixels, index = images(50), torch.arange(50)
    augment = Augment([{"crop": {"padding": 2}}, FLIP, {"cutout": {"size": 3}}], seed=8)
    expected = augment.train(pixels, 4, index)
    crop, flip, cutout = augment.steps
    assert isinstance(crop, Crop) and isinstance(flip, Flip) and isinstance(cutout, Cutout)
    shape = (2, 6, 7)
    top, left = crop.corners(shape, augment.draw(crop, 4, index))
    mirrored = flip.mirrored(augment.draw(flip, 4, index))
    row, column = cutout.corners(shape, augment.draw(cutout, 4, index))
    for n in range(50):
        image = torch.zeros(2, 10, 11, dtype=torch.uint8)
        image[:, 2:8, 2:9] = pixels[n]
        image = image[:, top[n] : top[n] + 6, left[n] : left[n] + 7]
        image = image.flip(2) if mirrored[n] else image.clone()
        image[:, max(0, row[n]) : row[n] + 3, max(0, column[n]) : column[n] + 3] = 0
        assert torch.equal(image, expected[n])


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


def test_a_cutout_larger_than_the_image_is_refused():
    augment = Augment([{"crop": {"size": 6}}, {"cutout": {"size": 7}}])
    with pytest.raises(InputError, match="a cutout of 7x7 pixels is larger than images of 6x6: choose a smaller size"):
        augment.shape((3, 9, 9))
    assert Augment([{"cutout": {"size": 6}}]).shape((3, 6, 9)) == (3, 6, 9)


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
