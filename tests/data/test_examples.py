from __future__ import annotations

import torch

from fahooks.data import Examples, Images

PIXELS = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES = Images(PIXELS, torch.arange(7))


def assert_statistics(found: tuple[torch.Tensor, torch.Tensor], pixels: torch.Tensor) -> None:
    by_channel = pixels.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found[0], by_channel.mean(1).float())
    torch.testing.assert_close(found[1], by_channel.std(1, correction=0).float())


def test_statistics_are_those_of_the_pixels():
    assert_statistics(IMAGES.statistics(), PIXELS)


def test_examples_are_some_of_the_images():
    places = torch.tensor([5, 0, 2])
    examples = Examples("x/train", IMAGES, places)
    assert (len(examples), examples.shape, examples.labels.tolist()) == (3, (3, 5, 4), [5, 0, 2])
    assert_statistics(examples.statistics(), PIXELS[places])


def test_a_fingerprint_changes_with_any_pixel_label_or_shape():
    changed = PIXELS.clone()
    changed[6, 2, 4, 3] ^= 1
    others = [Images(changed, IMAGES.labels), Images(PIXELS, IMAGES.labels.flip(0)), Images(PIXELS.mT, IMAGES.labels)]
    prints = {images.fingerprint() for images in (IMAGES, *others)}
    assert len(prints) == 4
    assert Images(PIXELS.clone(), torch.arange(7)).fingerprint() == IMAGES.fingerprint()
