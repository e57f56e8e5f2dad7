"""Datasets that are folders of images, FOLDER/CLASS/FILE, decoded once and held in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fahooks.data.datasets import Dataset
from fahooks.data.examples import Images
from fahooks.data.order import shuffled
from fahooks.plugins import InputError, datasets

IMAGENET = "Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575"


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
        InputError: the files are not there, or one can not be read.
    """
    return _two_folders("cifar10_jpeg", root / "cifar10-jpeg", ("train", "test"), side=32)


@datasets.register(
    "imagenet", summary="ImageNet, 1,000 classes, scaled and cropped to 299x299: needs 700 GB of memory", paper=IMAGENET
)
def imagenet(*, root: Path, download: bool) -> Dataset:
    """ImageNet (ILSVRC 2012) from ROOT/imagenet/{train,val}/WNID; the 50,000 images of val are the test set.

    Each image is scaled so that its shorter side has 299 pixels, the size of the paper's networks, and cropped to its centre.

    Arguments:
        root: the folder of all datasets.
        download: not read: ImageNet is given out to those who ask for it at https://image-net.org.

    Raises:
        InputError: the files are not there, one can not be read, or memory does not hold the decoded images.
    """
    return _two_folders("imagenet", root / "imagenet", ("train", "val"), side=299)


@datasets.register(
    "imagenet_sample", summary="a few ImageNet images for trying things out, 299x299, a fifth of them to test", paper=IMAGENET
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
    images, classes = read_folder("imagenet_sample", root / "imagenet-sample", side=299)
    order = shuffled(len(images), "imagenet_sample")
    test = len(images) // 5
    return Dataset("imagenet_sample", images[order[test:]], images[order[:test]], classes=len(classes))


def read_folder(name: str, folder: Path, *, side: int) -> tuple[Images, list[str]]:
    """Every image below FOLDER/CLASS, sorted by class and file, decoded to 3 channels of `side` x `side` pixels.

    Arguments:
        name: what messages call the dataset.
        folder: has a folder for each class.
        side: images of another size are scaled so that the shorter side has this many pixels, and cropped to their centre.

    Returns:
        The images, and the names of the classes in the order of their labels.

    Raises:
        InputError: the folder is not there, a class has no image, a file can not be decoded, or memory does not hold them all.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} is not at {folder} ({reason}): put images there, in a folder for each class, or set data.root"
        ) from error
    paths = [path for path, _ in found.samples]
    _require_memory(name, len(paths), side)
    pixels = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)

    def read(place: int) -> None:
        pixels[place] = _decode(name, paths[place], side)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(paths))):
            pass
    return Images(pixels, torch.tensor(found.targets)), found.classes


def _two_folders(name: str, folder: Path, parts: tuple[str, str], side: int) -> Dataset:
    (train, classes), (test, tested) = (read_folder(name, folder / part, side=side) for part in parts)
    if classes != tested:
        odd = sorted(set(classes) ^ set(tested))
        raise InputError(
            f"{name}: {folder / parts[0]} has {len(classes)} classes and {folder / parts[1]} has {len(tested)}, and they differ "
            f"in {', '.join(odd[:5])}: both need a folder for each class"
        )
    return Dataset(name, train, test, classes=len(classes))


def _decode(name: str, path: str, side: int) -> Tensor:
    """An image file as uint8 [3, side, side]."""
    from PIL import Image, ImageOps
    from torchvision.transforms import functional

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises at damaged files
        raise InputError(f"{name}: {path} can not be decoded ({' '.join(str(error).split())}): replace or remove it") from error
    return functional.pil_to_tensor(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))


def _require_memory(name: str, count: int, side: int) -> None:
    """Raise InputError where the decoded images do not fit."""
    need = count * 3 * side * side
    # Twice: a validation set is taken out of the training images by copying.
    if 2 * need > (have := _memory()):
        raise InputError(
            f"{name} has {count:,} images, which take {need / 1e9:,.1f} GB decoded to {side}x{side} and twice that while they "
            f"are divided, and this machine has {have / 1e9:,.1f} GB of memory: leave fewer images in the folder, or take a "
            "larger machine"
        )


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
