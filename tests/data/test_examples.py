from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data import Examples, Files, Images
from fahooks.data.decoding import CorruptFile
from fahooks.plugins import InputError

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


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The same images as files."""
    paths = [str(tmp_path / f"{number}.png") for number in range(7)]
    for pixels, path in zip(PIXELS, paths, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return Files(paths, torch.arange(7), side=4)


def test_files_are_read_on_demand(files: Files):
    examples = Examples("x/train", files, torch.tensor([5, 0, 2]))
    assert torch.equal(examples.read(1), PIXELS[0]) and examples.shape == (3, 4, 4)
    assert files[torch.tensor([3, 1])].labels.tolist() == [3, 1]
    assert torch.equal(files[torch.tensor([3, 1])].read(0), PIXELS[3])


def test_statistics_of_files_are_those_of_their_central_squares(files: Files):
    places = torch.tensor([5, 0, 2])
    # Images are 5 high and 4 wide: a central square begins at row 0.
    assert_statistics(Examples("x", files, places).statistics(), PIXELS[places][:, :, :4])


def test_statistics_leave_out_what_is_skipped(files: Files):
    Path(files.paths[2]).write_bytes(b"damaged")
    examples = Examples("x", files, torch.tensor([5, 0, 2]))
    with pytest.raises(CorruptFile):
        examples.statistics()
    assert_statistics(examples.statistics("skip"), PIXELS[[5, 0], :, :4])
    with pytest.raises(InputError, match="x: none of the first 2,000 files can be decoded"):
        Examples("x", files, torch.tensor([2])).statistics("skip")


def test_a_fingerprint_of_files_changes_with_name_size_time_and_label(files: Files):
    first = files.fingerprint()
    assert Files(files.paths, files.labels, side=9).fingerprint() == first, "what is stored does not depend on the side"
    others = [Files(files.paths, files.labels.flip(0), 4), Files(files.paths, files.labels, 4, channels=1)]
    prints = {first, files[torch.arange(6)].fingerprint(), *(other.fingerprint() for other in others)}
    os.utime(files.paths[3], (1, 1))
    prints.add(files.fingerprint())
    assert len(prints) == 5
    os.remove(files.paths[3])
    with pytest.raises(InputError, match="3.png can not be read: No such file"):
        files.fingerprint()
