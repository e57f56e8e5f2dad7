from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fahooks.data import datasets, image_folder
from fahooks.data.image_folder import read_folder
from fahooks.plugins import InputError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def write(path: Path, colour: tuple[int, ...] | int = RED, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """Two classes with two images to train on and one to test on each."""
    for part, count in (("train", 2), ("test", 1)):
        for label, colour in (("a", RED), ("b", GREEN)):
            for number in range(count):
                write(tmp_path / "cifar10-jpeg" / part / label / f"{number}.jpg", colour)
    return tmp_path


def test_a_folder_of_jpegs_is_read(jpegs: Path):
    found = datasets.load("cifar10_jpeg", root=jpegs, download=False)
    assert (found.shape, found.classes, len(found.train), len(found.test)) == ((3, 32, 32), 2, 4, 2)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.train.pixels.dtype == torch.uint8
    # Red and green, but for what JPEG loses.
    assert (found.train.pixels[:, 0].float().mean((1, 2)) > 250).tolist() == [True, True, False, False]
    assert (found.train.pixels[:, 1].float().mean((1, 2)) > 250).tolist() == [False, False, True, True]


def test_lossless_images_keep_every_pixel(tmp_path: Path):
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "only").mkdir()
    Image.fromarray(pixels.movedim(0, 2).numpy()).save(tmp_path / "only" / "x.png")
    images, classes = read_folder("x", tmp_path, side=8)
    assert torch.equal(images.pixels, pixels.unsqueeze(0)) and classes == ["only"]


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (23, 20)])
def test_images_are_scaled_to_the_shorter_side_and_cropped_to_the_centre(tmp_path: Path, width: int, height: int):
    ramp = numpy.zeros((height, width, 3), numpy.uint8)
    ramp[..., 0] = numpy.arange(width) * 6
    ramp[..., 1] = numpy.arange(height)[:, None] * 6
    (tmp_path / "only").mkdir()
    Image.fromarray(ramp).save(tmp_path / "only" / "x.png")
    pixels = read_folder("x", tmp_path, side=10)[0].pixels[0].float()
    assert pixels.shape == (3, 10, 10)
    for channel, length, along in ((0, width, 1), (1, height, 0)):
        pixel = 6 * min(width, height) / 10
        assert abs(pixels[channel].mean() - (length - 1) / 2 * 6) < pixel, "the centre of the image is the centre of the crop"
        steps = pixels[channel].diff(dim=along)[1:-1, 1:-1]
        assert abs(steps.mean() - pixel) < 1


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGBA", (9, 8, 7, 255)), ("P", 3)])
def test_every_image_gets_three_channels(tmp_path: Path, mode: str, colour: tuple[int, ...] | int):
    write(tmp_path / "only" / "x.png", colour, (4, 4), mode)
    assert read_folder("x", tmp_path, side=4)[0].pixels.shape == (1, 3, 4, 4)


def test_cmyk_jpegs_of_imagenet_are_read(tmp_path: Path):
    write(tmp_path / "only" / "x.jpeg", (0, 255, 255, 0), (4, 4), "CMYK")
    red, green, blue = read_folder("x", tmp_path, side=4)[0].pixels[0].float().mean((1, 2)).tolist()
    assert red > 200 and green < 50 and blue < 50


def test_imagenet_reads_train_and_val(tmp_path: Path):
    for part, count in (("train", 2), ("val", 1)):
        for label in ("n01440764", "n01443537"):
            for number in range(count):
                write(tmp_path / "imagenet" / part / label / f"{number}.JPEG", size=(30, 20))
    found = datasets.load("imagenet", root=tmp_path, download=True)
    assert (found.shape, found.classes, len(found.train), len(found.test)) == ((3, 299, 299), 2, 4, 2)


def test_the_sample_is_divided_once_and_for_all(tmp_path: Path):
    for number in range(10):
        write(tmp_path / "imagenet-sample" / f"n{number}" / "0.JPEG", (number * 20,) * 3, (4, 4))
    first, again = (datasets.load("imagenet_sample", root=tmp_path, download=False) for _ in range(2))
    assert (len(first.train), len(first.test), first.classes) == (8, 2, 10)
    assert torch.equal(first.test.labels, again.test.labels)
    assert sorted([*first.train.labels.tolist(), *first.test.labels.tolist()]) == list(range(10))
    assert first.train.pixels.float().mean((1, 2, 3)).div(20).round().tolist() == first.train.labels.tolist()


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10_jpeg", "cifar10-jpeg"), ("imagenet", "imagenet"), ("imagenet_sample", "imagenet-sample")]
)
def test_a_missing_folder_is_one_line_that_names_it(name: str, folder: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"{name} is not at {tmp_path / folder}.*a folder for each class") as caught:
        datasets.load(name, root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_is_named(jpegs: Path):
    (jpegs / "cifar10-jpeg" / "train" / "empty").mkdir()
    with pytest.raises(InputError, match="cifar10_jpeg is not at .*empty"):
        datasets.load("cifar10_jpeg", root=jpegs, download=False)


def test_folders_of_different_classes_are_refused(jpegs: Path):
    write(jpegs / "cifar10-jpeg" / "train" / "c" / "0.jpg")
    with pytest.raises(InputError, match="train has 3 classes and .*test has 2, and they differ in c"):
        datasets.load("cifar10_jpeg", root=jpegs, download=False)


@pytest.mark.parametrize("keep", [0, 20, 400])
def test_a_damaged_file_is_named_and_never_black(jpegs: Path, keep: int):
    damaged = jpegs / "cifar10-jpeg" / "train" / "b" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"{damaged} can not be decoded .*: replace or remove it") as caught:
        datasets.load("cifar10_jpeg", root=jpegs, download=False)
    assert "\n" not in str(caught.value)


def test_what_memory_does_not_hold_is_refused_before_it_is_decoded(jpegs: Path, monkeypatch: pytest.MonkeyPatch):
    # A machine whose memory holds four images once, but not twice.
    monkeypatch.setattr(image_folder, "_memory", lambda: 6 * 3 * 32 * 32)
    (jpegs / "cifar10-jpeg" / "train" / "b" / "1.jpg").write_bytes(b"damaged, which nobody gets to see")
    with pytest.raises(
        InputError, match="cifar10_jpeg has 4 images, which take 0.0 GB decoded to 32x32 and twice that"
    ) as caught:
        datasets.load("cifar10_jpeg", root=jpegs, download=False)
    assert "\n" not in str(caught.value)


def test_the_complete_imagenet_does_not_fit_into_small_machines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_folder, "_memory", lambda: 256 * 10**9)
    with pytest.raises(InputError, match=r"1,281,167 images, which take 343.6 GB decoded to 299x299 .* has 256.0 GB"):
        image_folder._require_memory("imagenet", 1_281_167, 299)
    monkeypatch.setattr(image_folder, "_memory", lambda: 700 * 10**9)
    image_folder._require_memory("imagenet", 1_281_167, 299)


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < image_folder._memory() < 2**50
