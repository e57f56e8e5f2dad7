from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from fahooks.data import datasets
from fahooks.data.datasets import Images
from fahooks.plugins import InputError, UnknownName


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
    assert digits.train.pixels.dtype == torch.uint8
    assert (digits.train.pixels.min(), digits.train.pixels.max()) == (0, 255)
    assert set(digits.train.labels.tolist()) == set(digits.test.labels.tolist()) == set(range(10))


def test_digits_are_split_once_and_for_all():
    from sklearn.datasets import load_digits

    first, second = (datasets.load("digits", root="x", download=False) for _ in range(2))
    assert torch.equal(first.test.pixels, second.test.pixels)
    every = torch.cat([first.train.pixels, first.test.pixels]).flatten(1)
    images, _ = load_digits(return_X_y=True)
    expected = torch.from_numpy(images).mul(255 / 16).round().byte()
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, expected.tolist()))


def test_statistics_are_those_of_the_pixels():
    pixels = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = Images(pixels, torch.zeros(7).long()).statistics()
    by_channel = pixels.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, by_channel.mean(1).float())
    torch.testing.assert_close(std, by_channel.std(1, correction=0).float())


def test_mnist_on_disk_is_read_without_a_download(small_mnist: Path):
    mnist = datasets.load("mnist", root=small_mnist, download=False)
    assert mnist.shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.test)) == (6, 4)
    assert mnist.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert mnist.train.pixels.flatten()[:300].tolist() == [i % 256 for i in range(300)]


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_missing_files_are_an_error_that_says_where_they_belong(name: str, folder: str, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        datasets.load(name, root=tmp_path, download=False)
    message = str(caught.value)
    assert str(tmp_path / folder / "raw" / "train-images-idx3-ubyte") in message
    assert "data.download=true" in message and "data.root" in message
    assert "\n" not in message


def test_a_failed_download_is_an_error_that_says_where_the_files_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torchvision.datasets

    # An address that nothing listens on, so that the real download fails at once, with or without a network.
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        datasets.load("mnist", root=tmp_path, download=True)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_the_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAHOOKS_DATA", "/somewhere")
    assert datasets.default_root() == "/somewhere"
    monkeypatch.delenv("FAHOOKS_DATA")
    assert datasets.default_root() == "~/data"


def test_real_mnist(data_root: Path):
    mnist = datasets.load("mnist", root=data_root, download=False)
    assert (len(mnist.train), len(mnist.test), mnist.shape, mnist.classes) == (60_000, 10_000, (1, 28, 28), 10)
    mean, std = mnist.train.statistics()
    # The constants that every MNIST tutorial normalises by.
    torch.testing.assert_close(mean / 255, torch.tensor([0.1307]), atol=1e-4, rtol=0)
    torch.testing.assert_close(std / 255, torch.tensor([0.3081]), atol=1e-4, rtol=0)
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
