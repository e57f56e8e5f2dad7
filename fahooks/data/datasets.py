"""Datasets by name: arrays, held in memory. Those that are folders of files are in `image_folder`."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fahooks.data.examples import Files, Images
from fahooks.data.order import shuffled
from fahooks.plugins import InputError, check_type, datasets

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10, MNIST


@dataclass(frozen=True)
class Dataset:
    """Labelled images to train and test on: all in memory (`Images`), or on disk and of any sizes (`Files`).

    Arguments:
        name: what it is registered as.
        train: the images to learn from; a validation split is taken out of these.
        test: the images that only the finished model sees.
        classes: the number of classes.
    """

    name: str
    train: Images | Files
    test: Images | Files
    classes: int

    def __post_init__(self) -> None:
        """Check `classes`, which a list of names is easily given for.

        Raises:
            InputError: it is no number.
        """
        check_type(f"classes of dataset {self.name!r}", self.classes, Integral, "their number")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image that is not augmented."""
        return self.train.shape


def default_root() -> str:
    """Where datasets live unless a recipe says otherwise: the environment variable FAHOOKS_DATA, else ~/data."""
    return os.environ.get("FAHOOKS_DATA") or "~/data"


def load(name: str, *, root: str | Path, download: bool, **options: Any) -> Dataset:
    """Load a registered dataset.

    Arguments:
        name: its registered name.
        root: the folder that holds datasets on disk.
        download: fetch the files where they are missing.
        options: those of that dataset.

    Raises:
        InputError: the name or an option is unknown, or the files are neither there nor to be had; the message says where they
            belong.
    """
    return datasets.get(name).build(root=Path(os.path.expanduser(root)), download=download, **options)


@datasets.register(
    "digits", summary="1,797 real handwritten digits, 8x8, that scikit-learn ships: no download", paper="Alpaydin, Kaynak 1998"
)
def digits(*, root: Path, download: bool) -> Dataset:
    """scikit-learn's handwritten digits, 8x8 and gray: a fixed 1,437 to train and 360 to test.

    Arguments:
        root: not read, since the images come with scikit-learn.
        download: not read.
    """
    from sklearn.datasets import load_digits

    images, labels = (cast(Any, load_digits())[key] for key in ("images", "target"))
    pixels = torch.from_numpy(images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    everything = Images(pixels, torch.from_numpy(labels).long())
    order = shuffled(len(everything), "digits")
    return Dataset("digits", everything[order[:1437]], everything[order[1437:]], classes=10)


@datasets.register("cifar10", summary="60,000 photographs of 10 classes, 32x32", paper="Krizhevsky 2009")
def cifar10(*, root: Path, download: bool) -> Dataset:
    """CIFAR-10 through torchvision: 50,000 to train, 10,000 to test, read from ROOT/cifar-10-batches-py.

    Arguments:
        root: the folder of all datasets.
        download: fetch the files where they are missing.

    Raises:
        InputError: the files are neither there nor to be had.
    """
    from torchvision.datasets import CIFAR10

    return _like_cifar("cifar10", CIFAR10, root, download, classes=10)


@datasets.register("cifar100", summary="60,000 photographs of 100 classes, 32x32", paper="Krizhevsky 2009")
def cifar100(*, root: Path, download: bool) -> Dataset:
    """CIFAR-100 through torchvision: 50,000 to train, 10,000 to test, read from ROOT/cifar-100-python.

    Arguments:
        root: the folder of all datasets.
        download: fetch the files where they are missing.

    Raises:
        InputError: the files are neither there nor to be had.
    """
    from torchvision.datasets import CIFAR100

    return _like_cifar("cifar100", CIFAR100, root, download, classes=100)


@datasets.register("mnist", summary="70,000 handwritten digits, 28x28", paper="LeCun, Bottou, Bengio, Haffner 1998")
def mnist(*, root: Path, download: bool) -> Dataset:
    """MNIST through torchvision: 60,000 to train, 10,000 to test, read from ROOT/MNIST/raw."""
    from torchvision.datasets import MNIST

    return _like_mnist("mnist", MNIST, root, download)


@datasets.register("fashion_mnist", summary="70,000 articles of clothing, 28x28", paper="Xiao, Rasul, Vollgraf 2017")
def fashion_mnist(*, root: Path, download: bool) -> Dataset:
    """Fashion-MNIST through torchvision: 60,000 to train, 10,000 to test, read from ROOT/FashionMNIST/raw."""
    from torchvision.datasets import FashionMNIST

    return _like_mnist("fashion_mnist", FashionMNIST, root, download)


def _like_cifar(name: str, source: type[CIFAR10], root: Path, download: bool, *, classes: int) -> Dataset:
    folder = root / source.base_folder
    files = [file for file, _ in (*source.train_list, *source.test_list)] + [source.meta["filename"]]
    packed = f"or {source.filename} into {root} with data.download=true"
    parts = _from_torchvision(name, source, root, folder, files, packed, download)
    train, test = (Images(torch.from_numpy(part.data).movedim(3, 1).contiguous(), torch.tensor(part.targets)) for part in parts)
    return Dataset(name, train, test, classes=classes)


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _like_mnist(name: str, source: type[MNIST], root: Path, download: bool) -> Dataset:
    packed = "unpacked, or as .gz with data.download=true"
    parts = _from_torchvision(name, source, root, root / source.__name__ / "raw", FILES, packed, download)
    train, test = (Images(part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return Dataset(name, train, test, classes=10)


def _from_torchvision(
    name: str, source: Callable[..., Any], root: Path, folder: Path, files: Sequence[str], packed: str, download: bool
) -> list[Any]:
    """The training and the test set of a class of torchvision, whose `files` belong into `folder`; `packed` is another way."""
    found = all((folder / file).is_file() for file in files)
    places = f"put {', '.join(files)} into {folder}"
    if not found and not download:
        raise InputError(
            f"{name} is not at {folder / files[0]}: {places}, set data.root, or allow the download with data.download=true"
        )
    try:
        with _no_empty_folders(folder):
            return [source(str(root), train=train, download=not found) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if found:
            raise InputError(f"{name} can not be read ({reason}): {places} ({packed}), or set data.root") from error
        raise InputError(
            f"{name} is not at {folder}, and could not be downloaded: set data.root, or put its files there ({packed}); "
            f"the download said: {textwrap.shorten(reason, 150, placeholder=' ...')}"
        ) from error
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"{name} in {folder} can not be read, a file there is damaged: replace it ({places})") from error


@contextmanager
def _no_empty_folders(folder: Path) -> Iterator[None]:
    """Where the block fails, remove `folder` and those above it that it made and left empty."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in absent:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
