"""Datasets that are folders of images, FOLDER/CLASS/FILE."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fahooks.data.datasets import Dataset
from fahooks.data.examples import Files
from fahooks.data.order import shuffled
from fahooks.plugins import InputError, datasets

IMAGENET = "Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575"


@datasets.register("imagefolder", summary="your own images, in a folder for each class: FOLDER/{train,val}/CLASS or FOLDER/CLASS")
def imagefolder(
    *,
    root: Path,
    download: bool,
    path: str,
    size: int = 224,
    channels: Literal[1, 3] = 3,
    test: float | None = None,
    test_seed: int = 0,
) -> Dataset:
    """Images of any sizes from ROOT/PATH.

    Arguments:
        root: the folder of all datasets.
        download: not read.
        path: the folder, below `root` or absolute.
        size: where no augmentation takes a box out of them, images are scaled so that the shorter side has this many pixels, and
            cropped to their central square.
        channels: 3 for red, green and blue, 1 for gray.
        test: None if PATH has the folders train and val (or test), with a folder for each class in both. Else PATH has the
            classes themselves, and this fraction of its images is the test set.
        test_seed: which images these are; it is not the seed of a run, so that all runs have the same test set.

    Raises:
        InputError: the files are not there, or an option is out of its range.
    """
    folder = root / Path(path).expanduser()
    if size < 1:
        raise InputError(f"size must be positive (got {size})")
    if test is None:
        second = "test" if not (folder / "val").is_dir() and (folder / "test").is_dir() else "val"
        return _two_folders("imagefolder", folder, ("train", second), side=size, channels=channels)
    files, classes = image_files("imagefolder", folder, side=size, channels=channels)
    return _divided("imagefolder", files, classes, test, test_seed)


@datasets.register(
    "cifar10_jpeg",
    summary="CIFAR-10 as JPEG files: lossy, so errors are not to be compared with those on `cifar10` to the last tenth",
    paper="Krizhevsky 2009",
)
def cifar10_jpeg(*, root: Path, download: bool) -> Dataset:
    """CIFAR-10 from ROOT/cifar10-jpeg/{train,test}/CLASS, where compression has changed the pixels a little.

    Arguments:
        root: the folder of all datasets.
        download: not read: nobody publishes these files.

    Raises:
        InputError: the files are not there.
    """
    return _two_folders("cifar10_jpeg", root / "cifar10-jpeg", ("train", "test"), side=32)


@datasets.register("imagenet", summary="ImageNet, 1,000 classes, scaled and cropped to 299x299 unless augmented", paper=IMAGENET)
def imagenet(*, root: Path, download: bool) -> Dataset:
    """ImageNet (ILSVRC 2012) from ROOT/imagenet/{train,val}/WNID; the 50,000 images of val are the test set.

    Where no augmentation takes a box out of them, images are scaled so that the shorter side has 299 pixels, the size of the
    paper's networks, and cropped to their centre.

    Arguments:
        root: the folder of all datasets.
        download: not read: ImageNet is given out to those who ask for it at https://image-net.org.

    Raises:
        InputError: the files are not there.
    """
    return _two_folders("imagenet", root / "imagenet", ("train", "val"), side=299)


@datasets.register(
    "imagenet_sample",
    summary="a few ImageNet images for trying things out, a fifth of them to test",
    paper=IMAGENET,
)
def imagenet_sample(*, root: Path, download: bool) -> Dataset:
    """Images from ROOT/imagenet-sample/WNID, as `imagenet` has them; the same fifth of them is always the test set.

    With an image a class, as in the sample that goes round, no network can get better than chance on that fifth.

    Arguments:
        root: the folder of all datasets.
        download: not read.

    Raises:
        InputError: as `imagenet`.
    """
    files, classes = image_files("imagenet_sample", root / "imagenet-sample", side=299)
    order = shuffled(len(files), "imagenet_sample")
    test = len(files) // 5
    return Dataset("imagenet_sample", files[order[test:]], files[order[:test]], classes=len(classes))


def image_files(name: str, folder: Path, *, side: int, channels: Literal[1, 3] = 3) -> tuple[Files, list[str]]:
    """Every image below FOLDER/CLASS, sorted by class and file; none is opened.

    Arguments:
        name: what messages call the dataset.
        folder: has a folder for each class.
        side: as in `Files`.
        channels: as in `Files`.

    Returns:
        The images, and the names of the classes in the order of their labels.

    Raises:
        InputError: the folder is not there, or a class has no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} is not at {folder} ({reason}): put images there, in a folder for each class, or set data.root"
        ) from error
    filled = set(found.targets)
    empty = [str(folder / label) for place, label in enumerate(found.classes) if place not in filled]
    if empty:
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        kinds = ", ".join(extension.removeprefix(".") for extension in IMG_EXTENSIONS)
        raise InputError(
            f"{name}: there is no image ({kinds}) in {', '.join(empty[:3])}{more}: put some there, or remove the folder"
        )
    return Files([path for path, _ in found.samples], torch.tensor(found.targets), side, channels), found.classes


def _two_folders(name: str, folder: Path, parts: tuple[str, str], *, side: int, channels: Literal[1, 3] = 3) -> Dataset:
    (train, classes), (test, tested) = (image_files(name, folder / part, side=side, channels=channels) for part in parts)
    if classes != tested:
        odd = sorted(set(classes) ^ set(tested))
        raise InputError(
            f"{name}: {folder / parts[0]} has {len(classes)} classes and {folder / parts[1]} has {len(tested)}, and they differ "
            f"in {', '.join(odd[:5])}: both need a folder for each class"
        )
    return Dataset(name, train, test, classes=len(classes))


def _divided(name: str, files: Files, classes: list[str], test: float, seed: int) -> Dataset:
    """All `files`, of which the fraction `test` is the test set."""
    count = round(test * len(files))
    if not 0 < count < len(files):
        raise InputError(f"{name}: test={test} takes {count} of {len(files)} images: set it so that one is left on each side")
    order = shuffled(len(files), name, seed)
    return Dataset(name, files[order[count:]], files[order[:count]], classes=len(classes))
