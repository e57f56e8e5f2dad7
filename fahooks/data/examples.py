"""Labelled images: where they lie, and which of them a split has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


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
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all pixels, float32 [C] each, in units of 0 to 255."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.pixels.transpose(0, 1)]).double()
        counts /= counts.sum(1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64)
        mean = counts @ levels
        variance = counts @ levels**2 - mean**2
        return mean.float(), variance.sqrt().float()

    def fingerprint(self) -> str:
        """A hash of all pixels and labels: what was made of these images is of use for others exactly if it is equal."""
        digest = hashlib.blake2b(repr(tuple(self.pixels.shape)).encode(), digest_size=16)
        digest.update(self.pixels.contiguous().numpy().data)
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
    source: Images
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self.source.labels[self.places]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image that is not augmented."""
        return self.source.shape

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all pixels, float32 [C] each, in units of 0 to 255."""
        return self.source[self.places].statistics()
