from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fahooks.data import Files, Images, datasets
from fahooks.plugins import InputError, UnknownName


def pixels(source: Images | Files) -> torch.Tensor:
    assert isinstance(source, Images)
    return source.pixels


def write_idx(path: Path, array: torch.Tensor) -> None:
    """The format of MNIST's files."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    path.write_bytes(header + array.numpy().tobytes())


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 6), ("t10k", 4)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", torch.arange(count * 28 * 28).remainder(256).byte().view(count, 28, 28))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", torch.arange(count).byte())
    return tmp_path


def test_digits_are_real_images_that_need_no_file(tmp_path: Path):
    digits = datasets.load("digits", root=tmp_path / "absent", download=False)
    assert digits.shape == (1, 8, 8)
    assert (len(digits.train), len(digits.test), digits.classes) == (1437, 360, 10)
    assert pixels(digits.train).dtype == torch.uint8
    assert (pixels(digits.train).min(), pixels(digits.train).max()) == (0, 255)
    assert set(digits.train.labels.tolist()) == set(digits.test.labels.tolist()) == set(range(10))


def test_digits_are_split_once_and_for_all():
    from sklearn.datasets import load_digits

    first, second = (datasets.load("digits", root="x", download=False) for _ in range(2))
    assert torch.equal(pixels(first.test), pixels(second.test))
    every = torch.cat([pixels(first.train), pixels(first.test)]).flatten(1)
    images, _ = load_digits(return_X_y=True)
    expected = torch.from_numpy(images).mul(255 / 16).round().byte()
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, expected.tolist()))


def test_mnist_on_disk_is_read_without_a_download(small_mnist: Path):
    mnist = datasets.load("mnist", root=small_mnist, download=False)
    assert mnist.shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.test)) == (6, 4)
    assert mnist.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert pixels(mnist.train).flatten()[:300].tolist() == [i % 256 for i in range(300)]


class _Dtype:
    """Pickles as numpy wrote the dtype of the original files: numpy.dtype("u1", 0, 1)."""

    def __reduce__(self) -> Any:
        return numpy.dtype, ("u1", 0, 1)


class _Array:
    """Pickles an array as the original files hold theirs."""

    def __init__(self, array: torch.Tensor) -> None:
        self.array = array

    def __reduce__(self) -> Any:
        state = (1, tuple(self.array.shape), _Dtype(), False, self.array.numpy().tobytes())
        return numpy.zeros(0, "u1").__reduce__()[0], (numpy.ndarray, (0,), b"b"), state


@pytest.fixture
def small_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five batches of two images to train on, and one of three to test on."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def sums(files: list[list[str]]) -> list[list[str]]:
        return [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file, _ in files]

    for number, (file, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        count = 3 if file == "test_batch" else 2
        row = (torch.arange(count * 3072) % 251).byte().view(count, 3072)
        (folder / file).write_bytes(pickle.dumps({"data": _Array(row), "labels": [number, *range(1, count)]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    # torchvision unpickles nothing but the files whose sums it knows.
    monkeypatch.setattr(CIFAR10, "train_list", sums(CIFAR10.train_list))
    monkeypatch.setattr(CIFAR10, "test_list", sums(CIFAR10.test_list))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums([["batches.meta", ""]])[0][1]})
    return tmp_path


def test_cifar10_on_disk_is_read_without_a_download(small_cifar10: Path):
    cifar10 = datasets.load("cifar10", root=small_cifar10, download=False)
    assert (cifar10.shape, len(cifar10.train), len(cifar10.test), cifar10.classes) == ((3, 32, 32), 10, 3, 10)
    assert cifar10.train.labels.tolist() == [0, 1, 1, 1, 2, 1, 3, 1, 4, 1]
    assert cifar10.train.labels.dtype == torch.int64
    # A row of the file is an image: 1,024 red values, then green, then blue, each row by row.
    assert pixels(cifar10.train)[0].flatten().tolist() == [i % 251 for i in range(3072)]
    assert pixels(cifar10.train).is_contiguous() and pixels(cifar10.train).dtype == torch.uint8


def test_cifar100_on_disk_is_read_with_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Made-up files with the names and keys of the real ones: https://www.cs.toronto.edu/~kriz/cifar.html."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    for file, count in (("train", 4), ("test", 2)):
        row = (torch.arange(count * 3072) % 251).byte().view(count, 3072)
        names = {"filenames": [f"{n}.png" for n in range(count)], "batch_label": f"{file}ing batch 1 of 1"}
        labels = {"fine_labels": [99, *range(1, count)], "coarse_labels": [19] * count}
        (folder / file).write_bytes(pickle.dumps({**names, **labels, "data": _Array(row)}, protocol=2))
    meta = {"fine_label_names": [str(n) for n in range(100)], "coarse_label_names": [str(n) for n in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    sums = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    cifar100 = datasets.load("cifar100", root=tmp_path, download=False)
    assert (cifar100.shape, len(cifar100.train), len(cifar100.test), cifar100.classes) == ((3, 32, 32), 4, 2, 100)
    assert cifar100.train.labels.tolist() == [99, 1, 2, 3]


def test_damaged_cifar10_is_not_unpickled(small_cifar10: Path):
    (small_cifar10 / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cifar10 can not be read .*corrupted.*cifar-10-python.tar.gz into") as caught:
        datasets.load("cifar10", root=small_cifar10, download=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_missing_files_are_an_error_that_says_where_they_belong(name: str, file: str, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        datasets.load(name, root=tmp_path, download=False)
    message = str(caught.value)
    assert str(tmp_path / file) in message
    assert "data.download=true" in message and "data.root" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
def test_a_failed_download_is_an_error_that_says_where_the_files_belong(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torchvision.datasets

    # An address that nothing listens on, so that the real download fails at once, with or without a network.
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        datasets.load(name, root=tmp_path / "absent" / "data", download=True)
    message = str(caught.value)
    assert str(tmp_path / "absent" / "data" / folder) in message and "\n" not in message
    # What to do stands before what went wrong, which may be long.
    assert message.index("set data.root") < message.index("the download said")
    assert len(message) < 400 + len(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="mnist is not at"):
        datasets.load("mnist", root=tmp_path / "file", download=True)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"nonsense, not images at all"])
def test_a_damaged_file_is_named(small_mnist: Path, content: bytes):
    (small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match="mnist in .* can not be read, a file there is damaged"):
        datasets.load("mnist", root=small_mnist, download=False)


def test_an_unknown_dataset_has_near_misses():
    with pytest.raises(UnknownName, match="'digits'"):
        datasets.load("digit", root="x", download=False)


def test_the_classes_of_a_dataset_are_a_number():
    images = Images(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(InputError, match=r"^classes of dataset 'mine' must be their number, got \['cat', 'dog'\]$"):
        datasets.Dataset("mine", images, images, ["cat", "dog"])  # pyright: ignore[reportArgumentType]


def test_the_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAHOOKS_DATA", "/somewhere")
    assert datasets.default_root() == "/somewhere"
    monkeypatch.delenv("FAHOOKS_DATA")
    assert datasets.default_root() == "~/data"


def test_real_mnist(data_root: Path):
    mnist = datasets.load("mnist", root=data_root, download=False)
    assert (len(mnist.train), len(mnist.test), mnist.shape, mnist.classes) == (60_000, 10_000, (1, 28, 28), 10)
    mean, std = Images(pixels(mnist.train), mnist.train.labels).statistics()
    # The constants that every MNIST tutorial normalises by.
    torch.testing.assert_close(mean / 255, torch.tensor([0.1307]), atol=1e-4, rtol=0)
    torch.testing.assert_close(std / 255, torch.tensor([0.3081]), atol=1e-4, rtol=0)
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
