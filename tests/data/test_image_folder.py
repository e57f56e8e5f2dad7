from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fahooks.data import Augment, Batch, Examples, FfcvLoader, Files, Loader, MemoryLoader, TorchvisionLoader, View, datasets
from fahooks.data.decoding import CorruptFile
from fahooks.data.ffcv import library
from fahooks.data.image_folder import image_files
from fahooks.plugins import InputError

TINY = {"path": "tiny-imagenet-32", "size": 32}
REAL = {  # options of the dataset, images to train and to test on, classes
    "cifar10_jpeg": ({}, 50_000, 10_000, 10),
    "imagefolder": (TINY, 100_000, 10_000, 200),
    "imagenet_sample": ({}, 200, 50, 250),
}

RED, GREEN = (255, 0, 0), (0, 255, 0)


def write(path: Path, colour: tuple[int, ...] | int = RED, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def colours(source: object) -> list[list[int]]:
    """The mean of each channel of each image, in steps of 20."""
    assert isinstance(source, Files)
    return [source.read(place).float().mean((1, 2)).div(20).round().int().tolist() for place in range(len(source))]


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """Two classes with two images to train on and one to test on each."""
    for part, count in (("train", 2), ("test", 1)):
        for label, colour in (("a", RED), ("b", GREEN)):
            for number in range(count):
                write(tmp_path / "cifar10-jpeg" / part / label / f"{number}.jpg", colour)
    return tmp_path


def test_a_folder_of_jpegs_is_listed_and_read_on_demand(jpegs: Path):
    found = datasets.load("cifar10_jpeg", root=jpegs, download=False)
    assert (found.shape, found.classes, len(found.train), len(found.test)) == ((3, 32, 32), 2, 4, 2)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    # Red and green, but for what JPEG loses.
    assert colours(found.train) == [[13, 0, 0], [13, 0, 0], [0, 13, 0], [0, 13, 0]]
    (jpegs / "cifar10-jpeg" / "train" / "b" / "1.jpg").write_bytes(b"damaged")
    with pytest.raises(CorruptFile):
        datasets.load("cifar10_jpeg", root=jpegs, download=False).train.read(3)


def test_imagenet_has_train_and_val(tmp_path: Path):
    for part, count in (("train", 2), ("val", 1)):
        for label in ("n01440764", "n01443537"):
            for number in range(count):
                write(tmp_path / "imagenet" / part / label / f"{number}.JPEG", size=(30, 20))
    found = datasets.load("imagenet", root=tmp_path, download=True)
    assert (found.shape, found.classes, len(found.train), len(found.test)) == ((3, 299, 299), 2, 4, 2)
    assert found.train.read(0).shape == (3, 20, 30)


def test_the_sample_is_divided_once_and_for_all(tmp_path: Path):
    for number in range(10):
        write(tmp_path / "imagenet-sample" / f"n{number}" / "0.JPEG", (number * 20,) * 3, (4, 4))
    first, again = (datasets.load("imagenet_sample", root=tmp_path, download=False) for _ in range(2))
    assert (len(first.train), len(first.test), first.classes) == (8, 2, 10)
    assert torch.equal(first.test.labels, again.test.labels)
    assert sorted([*first.train.labels.tolist(), *first.test.labels.tolist()]) == list(range(10))
    assert [red for red, _, _ in colours(first.train)] == first.train.labels.tolist()


@pytest.mark.parametrize("second", ["val", "test"])
def test_a_folder_of_your_own_has_train_and_val_or_test(tmp_path: Path, second: str):
    for part, count in (("train", 3), (second, 1)):
        for number in range(count):
            write(tmp_path / "mine" / part / "a" / f"{number}.png", number * 40, mode="L")
    found = datasets.load("imagefolder", root=tmp_path, download=False, path="mine", size=16, channels=1)
    assert (found.shape, found.classes, len(found.train), len(found.test)) == ((1, 16, 16), 1, 3, 1)
    assert colours(found.train) == [[0], [2], [4]]
    assert datasets.load("imagefolder", root="elsewhere", download=False, path=str(tmp_path / "mine")).shape == (3, 224, 224)


def test_a_single_folder_is_divided_by_a_seed_of_its_own(tmp_path: Path):
    for label in ("a", "b"):
        for number in range(10):
            write(tmp_path / label / f"{number}.png", (number * 20, 0, 0))
    first, again, other = (
        datasets.load("imagefolder", root=tmp_path, download=False, path=".", test=0.25, test_seed=seed) for seed in (0, 0, 1)
    )
    assert isinstance(first.train, Files) and isinstance(first.test, Files) and isinstance(again.test, Files)
    assert (len(first.train), len(first.test), first.classes) == (15, 5, 2)
    assert first.test.paths == again.test.paths != (other.test.paths if isinstance(other.test, Files) else None)
    assert len({*first.train.paths, *first.test.paths}) == 20
    for files in (first.train, first.test):
        assert [Path(path).parent.name for path in files.paths] == ["ab"[label] for label in files.labels.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dataset 'imagefolder' needs the option 'path'"),
        ({"path": "x", "size": 0}, "size must be positive .got 0."),
        ({"path": "x", "test": 0.01}, "test=0.01 takes 0 of 2 images"),
        ({"path": "x", "test": 1.0}, "test=1.0 takes 2 of 2 images"),
        ({"path": "x"}, "imagefolder is not at .*x/train"),
        ({"path": "x", "sice": 3}, "has no option 'sice' - did you mean 'size'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, object], message: str):
    write(tmp_path / "x" / "a" / "0.png")
    write(tmp_path / "x" / "b" / "0.png")
    with pytest.raises(InputError, match=message):
        datasets.load("imagefolder", root=tmp_path, download=False, **options)


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10_jpeg", "cifar10-jpeg"), ("imagenet", "imagenet"), ("imagenet_sample", "imagenet-sample")]
)
def test_a_missing_folder_is_one_line_that_names_it(name: str, folder: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"{name} is not at {tmp_path / folder}.*a folder for each class") as caught:
        datasets.load(name, root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_is_named(jpegs: Path):
    train = jpegs / "cifar10-jpeg" / "train"
    for number in range(5):
        (train / f"empty{number}").mkdir()
        (train / f"empty{number}" / "notes.txt").touch()
        said = ", ".join(str(train / f"empty{n}") for n in range(min(3, number + 1))) + (f" and {number - 2} more" * (number > 2))
        with pytest.raises(InputError) as caught:
            datasets.load("cifar10_jpeg", root=jpegs, download=False)
        assert str(caught.value).startswith("cifar10_jpeg: there is no image (jpg, ") and f") in {said}: put" in str(caught.value)


def test_folders_of_different_classes_are_refused(jpegs: Path):
    write(jpegs / "cifar10-jpeg" / "train" / "c" / "0.jpg")
    with pytest.raises(InputError, match="train has 3 classes and .*test has 2, and they differ in c"):
        datasets.load("cifar10_jpeg", root=jpegs, download=False)


def test_classes_are_numbered_in_the_order_of_their_names(tmp_path: Path):
    for label in ("b", "a", "C"):
        write(tmp_path / label / "0.png")
    files, classes = image_files("x", tmp_path, side=8)
    assert classes == ["C", "a", "b"] and files.labels.tolist() == [0, 1, 2]
    assert (files.side, files.channels) == (8, 3)


def real(name: str, root: Path) -> datasets.Dataset:
    options, *_ = REAL[name]
    folder = root / {"cifar10_jpeg": "cifar10-jpeg", "imagefolder": TINY["path"], "imagenet_sample": "imagenet-sample"}[name]
    if not folder.is_dir():
        pytest.skip(f"there is no {folder.name} under FAHOOKS_DATA")
    return datasets.load(name, root=root, download=False, **options)


@pytest.mark.parametrize("name", REAL)
def test_real_folders_have_the_images_that_they_are_known_for(data_root: Path, name: str):
    found = real(name, data_root)
    assert (len(found.train), len(found.test), found.classes) == REAL[name][1:]


@pytest.mark.parametrize("steps", [[], [{"random_resized_crop": {"size": 24}}, {"flip": {}}]], ids=["whole", "cropped"])
@pytest.mark.parametrize("loader", ["torchvision", "ffcv"])
@pytest.mark.parametrize("name", REAL)
def test_real_images_are_the_same_from_every_loader(data_root: Path, tmp_path: Path, name: str, loader: str, steps: list[Any]):
    if loader == "ffcv" and library.missing():
        pytest.skip(str(library.missing()))
    source = real(name, data_root).train
    # FFCV's file holds all images of a source, so the source is cut down, to images of many classes.
    some = source[torch.arange(0, len(source), len(source) // 30)]
    examples = Examples(f"{name}/train", some, torch.randperm(len(some), generator=torch.Generator().manual_seed(0)))
    view = View(9, True, *examples.statistics(), seed=7, augment=Augment(steps, seed=7))
    loaders = {"torchvision": TorchvisionLoader(workers=2), "ffcv": FfcvLoader(folder=str(tmp_path), mode="raw", workers=2)}
    expected = batches(MemoryLoader(), examples, view)
    assert len(expected) == -(-len(some) // 9) >= 4
    for ours, theirs in zip(batches(loaders[loader], examples, view), expected, strict=True):
        for part in ("images", "labels", "index", "valid"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part)), part


def batches(loader: Loader, examples: Examples, view: View) -> list[Batch]:
    loader.prepare(examples)
    with loader.open(examples, view) as stream:
        stream.set_epoch(1)
        return list(stream)
