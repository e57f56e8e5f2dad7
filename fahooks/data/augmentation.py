"""Augmentation: what is done to training images, as a pure function of (seed, epoch, index) and of no random stream.

So a loader may cut an epoch into batches as it likes, on any device and from any number of processes, and a resumed run goes on
with the pixels that it would have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fahooks.data.draw import Draw
from fahooks.data.framing import Framing, Shape, frame
from fahooks.plugins import InputError, augmentations


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

    def corners(self, shape: Shape, draw: Draw) -> tuple[Tensor, Tensor]:
        """Top and left of each window, int64 [N] each, counted from the corner of the padded image of `shape` (C, H, W)."""
        _, height, width = shape
        _, high, wide = self.shape(shape)
        rows, columns = height + 2 * self.padding - high + 1, width + 2 * self.padding - wide + 1
        return draw.below(rows, "row"), draw.below(columns, "column")

    def train(self, pixels: Tensor, draw: Draw) -> Tensor:
        """Windows in places drawn uniformly."""
        _, channels, height, width = pixels.shape
        top, left = self.corners((channels, height, width), draw)
        return self._windows(pixels)[torch.arange(len(pixels), device=pixels.device), :, top, left]

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

    def mirrored(self, draw: Draw) -> Tensor:
        """Bool [N], which images are mirrored."""
        return draw.below(2, "flip").bool()

    def train(self, pixels: Tensor, draw: Draw) -> Tensor:
        """Each image as it is or mirrored."""
        column = torch.arange(pixels.shape[3], device=pixels.device)
        source = torch.where(self.mirrored(draw)[:, None], column.flip(0), column)
        # One gather moves each pixel once, where choosing between the images and their mirror images moves it three times.
        return pixels.gather(3, source[:, None, None, :].expand(pixels.shape))


@augmentations.register(
    "cutout", summary="a square in a random place painted over", paper="DeVries, Taylor 2017, https://arxiv.org/abs/1708.04552"
)
class Cutout(Augmentation):
    """A square painted over, whose centre is any pixel of the image: parts of the square may lie outside.

    Arguments:
        size: pixels of a side of the square.
        fill: the value that it gets in every channel, 0 to 255.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(self, *, size: int, fill: int = 0) -> None:
        if size < 1:
            raise InputError(f"size must be positive (got {size})")
        if not 0 <= fill <= 255:
            raise InputError(f"fill must be a value of a pixel, 0 to 255 (got {fill})")
        self.size = size
        self.fill = fill

    def shape(self, shape: Shape) -> Shape:
        """`shape`, as it is.

        Raises:
            InputError: the square is larger than the image.
        """
        _, height, width = shape
        if self.size > min(height, width):
            raise InputError(
                f"a cutout of {self.size}x{self.size} pixels is larger than images of {height}x{width}: choose a smaller size"
            )
        return shape

    def corners(self, shape: Shape, draw: Draw) -> tuple[Tensor, Tensor]:
        """Top and left of each square, int64 [N] each, in images of `shape` (C, H, W); negative where it begins outside."""
        _, height, width = shape
        return draw.below(height, "row") - self.size // 2, draw.below(width, "column") - self.size // 2

    def train(self, pixels: Tensor, draw: Draw) -> Tensor:
        """Images with their square painted over."""
        _, channels, height, width = pixels.shape
        inside = [
            (place >= corner[:, None]) & (place < corner[:, None] + self.size)
            for corner, place in zip(
                self.corners((channels, height, width), draw),
                (torch.arange(height, device=pixels.device), torch.arange(width, device=pixels.device)),
                strict=True,
            )
        ]
        return pixels.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], self.fill)


class Augment:
    """Augmentation steps, one after the other.

    Arguments:
        steps: registered names with their options, one a mapping, such as [{"crop": {"size": 24}}, {"flip": {}}].
        seed: what all random choices depend on, with the epoch and the image.

    Attributes:
        framing: the first step, where it takes a box out of images of any size; else None.
        steps: the others, which change images that have one size by now.

    Raises:
        InputError: a step is unknown, its options are wrong, or it can be the first one only.
    """

    def __init__(self, steps: Sequence[Mapping[str, Mapping[str, Any]]] = (), seed: int = 0) -> None:
        named = [(name, augmentations.get(name).build(**options)) for step in steps for name, options in step.items()]
        for name, step in named[1:]:
            if isinstance(step, Framing):
                raise InputError(
                    f"{name} takes its box out of the image as it is stored: it must be the first step of data.augment"
                )
        built = [step for _, step in named]
        self.framing: Framing | None = built.pop(0) if built and isinstance(built[0], Framing) else None
        self.steps: list[Augmentation] = built
        self.seed = seed

    def shape(self, shape: Shape) -> Shape:
        """The shape (C, H, W) of an image after all steps.

        Raises:
            InputError: images of `shape` do not go through them.
        """
        for step in (self.framing, *self.steps):
            shape = step.shape(shape) if step else shape
        return shape

    def draw(self, step: Augmentation | Framing, epoch: int, index: Tensor) -> Draw:
        """What `step` draws from in `epoch`; `index` [N] is the place of each image in its split."""
        place = ([self.framing] if self.framing else []) + self.steps
        return Draw(index, ("augment", self.seed, epoch, next(i for i, s in enumerate(place) if s is step)))

    def train(self, pixels: Tensor, epoch: int, index: Tensor, *, framed: bool = False) -> Tensor:
        """Training images as they are seen in `epoch`.

        Arguments:
            pixels: uint8 [N, C, H, W].
            epoch: which one.
            index: int64 [N], the place of each image in its split, on the device of `pixels`.
            framed: whether `framing` was applied already.
        """
        if self.framing and not framed:
            boxes = self.framing.train(_sizes(pixels), self.draw(self.framing, epoch, index.cpu()))
            pixels = _framed(pixels, boxes, self.framing.size)
        for step in self.steps:
            pixels = step.train(pixels, self.draw(step, epoch, index))
        return pixels

    def evaluate(self, pixels: Tensor, *, framed: bool = False) -> Tensor:
        """Images uint8 [N, C, H, W] as the finished model sees them: nothing in it is random. `framed` as in `train`."""
        if self.framing and not framed:
            pixels = _framed(pixels, self.framing.evaluate(_sizes(pixels)), self.framing.size)
        for step in self.steps:
            pixels = step.evaluate(pixels)
        return pixels


def _sizes(pixels: Tensor) -> Tensor:
    return torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)


def _framed(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    images = zip(pixels.cpu(), boxes.tolist(), strict=True)
    return torch.stack([frame(image, box, size) for image, box in images]).to(pixels.device)
