"""Labelled images: where they lie, and which of them a split has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from fahooks.data.decoding import CorruptFile, decode
from fahooks.data.framing import CenterCrop, Shape, frame
from fahooks.plugins import InputError

# How many files mean and standard deviation are taken of: enough to know them to a percent or two.
MEASURED_FILES = 2000


@dataclass(frozen=True)
class Images:
    """Labelled images in memory.

    Arguments:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    @property
    def shape(self) -> Shape:
        """The shape (C, H, W) of an image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def framing(self) -> None:
        """What makes all images one size where no augmentation does; nothing, as they have one."""
        return None

    def read(self, place: int) -> Tensor:
        """An image, uint8 [C, H, W]."""
        return self.pixels[place]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all pixels, float32 [C] each, in units of 0 to 255."""
        return _statistics(_histogram(self.pixels))

    def fingerprint(self) -> str:
        """A hash of all pixels and labels: what was made of these images is of use for others exactly if it is equal."""
        digest = hashlib.blake2b(repr(tuple(self.pixels.shape)).encode(), digest_size=16)
        digest.update(self.pixels.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Files:
    """Labelled images on disk, of any sizes, each decoded when it is asked for.

    Arguments:
        paths: a file an image.
        labels: int64 [N].
        side: where no augmentation takes a box out of them, images are scaled so that the shorter side has this many pixels, and
            cropped to their central square.
        channels: 3 for red, green and blue, 1 for gray.
    """

    paths: Sequence[str]
    labels: Tensor
    side: int
    channels: Literal[1, 3] = 3

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Files:
        places: list[int] = index.tolist()
        return Files([self.paths[place] for place in places], self.labels[index], self.side, self.channels)

    @property
    def shape(self) -> Shape:
        """The shape (C, side, side) of an image that no augmentation takes a box out of."""
        return self.channels, self.side, self.side

    @property
    def framing(self) -> CenterCrop:
        """What makes all images one size where no augmentation does."""
        return CenterCrop(size=self.side)

    def read(self, place: int) -> Tensor:
        """An image of its own size, uint8 [C, H, W].

        Raises:
            CorruptFile: it can not be decoded; the message names it.
        """
        return decode(self.paths[place], self.channels)

    def fingerprint(self) -> str:
        """A hash of the names, sizes and times of all files and of their labels.

        Raises:
            InputError: a file is not there any more.
        """
        digest = hashlib.blake2b(repr((len(self), self.channels)).encode(), digest_size=16)
        for path in self.paths:
            try:
                found = os.stat(path)
            except OSError as error:
                raise InputError(f"{path} can not be read: {error.strerror}") from error
            digest.update(repr((path.split(os.sep)[-2:], found.st_size, found.st_mtime_ns)).encode())
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Examples:
    """A split: some of the images of a source, which stay where they are.

    Arguments:
        name: dataset and part that the source is, such as "cifar10/train".
        source: all images of that part.
        places: int64 [N], where in the source each example is.
    """

    name: str
    source: Images | Files
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self.source.labels[self.places]

    @property
    def shape(self) -> Shape:
        """The shape (C, H, W) of an image that is not augmented."""
        return self.source.shape

    def read(self, place: int) -> Tensor:
        """The example at `place`, uint8 [C, H, W]; see `Files.read`."""
        return self.source.read(int(self.places[place]))

    def statistics(self, corrupt: Literal["refuse", "skip"] = "refuse") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all pixels, float32 [C] each, in units of 0 to 255.

        Of files it is those of the first 2,000 examples, as they are where no augmentation changes them.

        Arguments:
            corrupt: whether files that can not be decoded are refused or left out.

        Raises:
            InputError: a file can not be decoded, or none can.
        """
        if isinstance(self.source, Images):
            return self.source[self.places].statistics()
        histogram = torch.zeros(self.shape[0], 256, dtype=torch.int64)
        with ThreadPoolExecutor() as pool:
            for part in pool.map(partial(_histogram_of_file, self.source, corrupt), self.places[:MEASURED_FILES].tolist()):
                histogram += part
        if not histogram.any():
            raise InputError(f"{self.name}: none of the first {MEASURED_FILES:,} files can be decoded")
        return _statistics(histogram)


def _histogram_of_file(source: Files, corrupt: Literal["refuse", "skip"], place: int) -> Tensor:
    try:
        image = source.read(place)
    except CorruptFile:
        if corrupt == "refuse":
            raise
        return torch.zeros(source.channels, 256, dtype=torch.int64)
    (box,) = source.framing.evaluate(torch.tensor([image.shape[1:]])).tolist()
    return _histogram(frame(image, box, source.side)[None])


def _histogram(pixels: Tensor) -> Tensor:
    """How often each value is in each channel of uint8 [N, C, H, W], int64 [C, 256]."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.transpose(0, 1)])


def _statistics(histogram: Tensor) -> tuple[Tensor, Tensor]:
    counts = histogram.double() / histogram.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = counts @ levels
    variance = counts @ levels**2 - mean**2
    return mean.float(), variance.clamp(min=0).sqrt().float()
