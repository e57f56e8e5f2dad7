"""Augmentation: what is done to training images, as a pure function of (seed, epoch, index) and of no random stream.

So a loader may cut an epoch into batches as it likes, on any device and from any number of processes, and a resumed run goes on
with the pixels that it would have seen.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fahooks.plugins import InputError, augmentations

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Draw:
    """Whole numbers for a batch, each a pure function of its image and of the key.

    Arguments:
        index: int64 [N], the place of each image in its split.
        key: what else the numbers depend on, such as seed and epoch.
    """

    index: Tensor
    key: tuple[str | int, ...]

    def below(self, count: int, *key: str | int) -> Tensor:
        """int64 [N], uniform in range(count), for count up to 2**31; different for different `key`."""
        digest = hashlib.blake2b(repr((*self.key, *key)).encode(), digest_size=8).digest()
        bits = _splitmix64(int.from_bytes(digest, "little", signed=True) + _GOLDEN * (self.index + 1))
        return _shifted(_shifted(bits, 32) * count, 32)


class Augmentation(ABC):
    """One step: a random change of uint8 images [N, C, H, W] that are trained on. Options are arguments of `__init__`."""

    @abstractmethod
    def train(self, pixels: Tensor, draw: Draw) -> Tensor:
        """The changed images, uint8 [N, *shape(C, H, W)]; all that is random in them comes from `draw`."""

    def evaluate(self, pixels: Tensor) -> Tensor:
        """What images to evaluate go through instead: by default nothing. They must end in the same shape."""
        return pixels

    def shape(self, shape: Shape) -> Shape:
        """The shape (C, H, W) of an image afterwards.

        Raises:
            InputError: images of `shape` do not go through this step.
        """
        return shape


@augmentations.register("crop", summary="a window in a random place; in evaluation the one in the centre")
class Crop(Augmentation):
    """A window of the image, black-padded first, in a random place; in evaluation in the centre.

    Arguments:
        size: pixels of a side of the window; None for the image's own height and width.
        padding: black pixels put around the image on each side.

    Raises:
        InputError: an option is out of its range, or neither moves the window.
    """

    def __init__(self, *, size: int | None = None, padding: int = 0) -> None:
        if padding < 0:
            raise InputError(f"padding must not be negative (got {padding})")
        if size is not None and size < 1:
            raise InputError(f"size must be positive (got {size})")
        if size is None and padding == 0:
            raise InputError("a crop needs size, padding or both: without them it would change nothing")
        self.size = size
        self.padding = padding

    def shape(self, shape: Shape) -> Shape:
        """(C, size, size), or `shape` where no size is given.

        Raises:
            InputError: the window is larger than the padded image.
        """
        channels, height, width = shape
        if self.size is None:
            return shape
        if self.size > min(height, width) + 2 * self.padding:
            raise InputError(
                f"a crop of {self.size}x{self.size} pixels does not fit into images of {height}x{width} with padding "
                f"{self.padding}: choose a smaller size"
            )
        return channels, self.size, self.size

    def train(self, pixels: Tensor, draw: Draw) -> Tensor:
        """Windows in places drawn uniformly."""
        windows = self._windows(pixels)
        rows, columns = windows.shape[2:4]
        image = torch.arange(len(pixels), device=pixels.device)
        return windows[image, :, draw.below(rows, "row"), draw.below(columns, "column")]

    def evaluate(self, pixels: Tensor) -> Tensor:
        """The window in the centre."""
        windows = self._windows(pixels)
        rows, columns = windows.shape[2:4]
        return windows[:, :, (rows - 1) // 2, (columns - 1) // 2]

    def _windows(self, pixels: Tensor) -> Tensor:
        """Every window that there is, a view [N, C, rows, columns, height, width]."""
        _, channels, height, width = pixels.shape
        _, high, wide = self.shape((channels, height, width))
        return F.pad(pixels, [self.padding] * 4).unfold(2, high, 1).unfold(3, wide, 1)


@augmentations.register("flip", summary="left and right exchanged, for half of the images")
class Flip(Augmentation):
    """Left and right exchanged, for half of the images."""

    def train(self, pixels: Tensor, draw: Draw) -> Tensor:
        """Each image as it is or mirrored."""
        return torch.where(draw.below(2, "flip").bool()[:, None, None, None], pixels.flip(3), pixels)


class Augment:
    """Augmentation steps, one after the other.

    Arguments:
        steps: registered names with their options, one a mapping, such as [{"crop": {"size": 24}}, {"flip": {}}].
        seed: what all random choices depend on, with the epoch and the image.

    Raises:
        InputError: a step is unknown, or its options are wrong.
    """

    def __init__(self, steps: Sequence[Mapping[str, Mapping[str, Any]]] = (), seed: int = 0) -> None:
        self.steps: list[Augmentation] = [
            augmentations.get(name).build(**options) for step in steps for name, options in step.items()
        ]
        self.seed = seed

    def shape(self, shape: Shape) -> Shape:
        """The shape (C, H, W) of an image after all steps.

        Raises:
            InputError: images of `shape` do not go through them.
        """
        for step in self.steps:
            shape = step.shape(shape)
        return shape

    def train(self, pixels: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Training images uint8 [N, C, H, W] as they are seen in `epoch`; `index` [N] is their place in the split."""
        for place, step in enumerate(self.steps):
            pixels = step.train(pixels, Draw(index, ("augment", self.seed, epoch, place)))
        return pixels

    def evaluate(self, pixels: Tensor) -> Tensor:
        """Images uint8 [N, C, H, W] as the finished model sees them: nothing in it is random."""
        for step in self.steps:
            pixels = step.evaluate(pixels)
        return pixels


# SplitMix64 (Steele, Lea, Flood 2014) read at any place of its stream. int64 arithmetic wraps alike on every device.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _splitmix64(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ _shifted(state, 27)) * (0x94D049BB133111EB - 2**64)
    return state ^ _shifted(state, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """The 64 bits moved right, zeros coming in: torch's own shift brings in the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
