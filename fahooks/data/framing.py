"""Framing: which box of an image, whatever its size, becomes the image that is seen.

Drawing the box is apart from cutting it out, so that a loader may do the cutting while it decodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fahooks.data.draw import Draw
from fahooks.plugins import InputError, augmentations

Shape = tuple[int, int, int]

TRIES = 10


class Framing(ABC):
    """A box of each image, scaled to a square. Only the first step of augmentation can be one.

    Arguments:
        size: pixels of a side of the square.
        resize: in evaluation the box is the one that "scale the shorter side to `resize`, cut out the central square of `size`"
            has; None for round(size / 0.875), such as 256 for 224.

    Attributes:
        random: whether training draws the box; if not, it is that of evaluation.
    """

    random: bool = False

    def __init__(self, *, size: int, resize: int | None) -> None:
        self.size = size
        self.resize = round(size / 0.875) if resize is None else resize
        if size < 1:
            raise InputError(f"size must be positive (got {size})")
        if self.resize < size:
            raise InputError(f"resize must not be less than size, {size} (got {resize}): the square would leave the image")

    def shape(self, shape: Shape) -> Shape:
        """(C, size, size)."""
        return shape[0], self.size, self.size

    @abstractmethod
    def train(self, sizes: Tensor, draw: Draw) -> Tensor:
        """The boxes to train on.

        Arguments:
            sizes: int64 [N, 2] on the CPU, height and width of each image.
            draw: all that is random in the boxes comes from it.

        Returns:
            int64 [N, 4]: top, left, height, width.
        """

    def evaluate(self, sizes: Tensor) -> Tensor:
        """The central boxes, int64 [N, 4] (top, left, height, width), of images of `sizes` [N, 2]."""
        side = (sizes.amin(1).double() * self.size / self.resize).round().long().clamp(min=1)
        return _central(sizes, side, side)


@augmentations.register("center_crop", summary="the central square, scaled, for images of any size; first step only")
class CenterCrop(Framing):
    """The central square, scaled: what training and evaluation see is the same.

    Arguments:
        size: pixels of a side.
        resize: what the shorter side is scaled to before; None for `size`, so that the whole shorter side is seen.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(self, *, size: int, resize: int | None = None) -> None:
        super().__init__(size=size, resize=size if resize is None else resize)

    def train(self, sizes: Tensor, draw: Draw) -> Tensor:
        """The central boxes."""
        return self.evaluate(sizes)


@augmentations.register(
    "random_resized_crop",
    summary="a box of random area and shape, scaled, for images of any size; in evaluation the centre; first step only",
    paper="Szegedy et al. 2015, https://arxiv.org/abs/1409.4842",
)
class RandomResizedCrop(Framing):
    """A box of random area, shape and place, scaled to a square; in evaluation the centre.

    As in torchvision: an area and a shape are drawn until a box fits the image, ten times at most; then it is the largest central
    box of an allowed shape.

    Arguments:
        size: pixels of a side of the square.
        scale: the least and the greatest area, as a fraction of the image's.
        ratio: the least and the greatest width, as a multiple of the height.
        resize: for evaluation: what the shorter side is scaled to before the central square of `size` is taken; None for
            round(size / 0.875), such as 256 for 224.

    Raises:
        InputError: an option is out of its range.
    """

    random = True

    def __init__(
        self,
        *,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        resize: int | None = None,
    ) -> None:
        super().__init__(size=size, resize=resize)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(f"scale must be two numbers in order between 0 and 1 (got {list(scale)})")
        if not 0 < ratio[0] <= ratio[1] < math.inf:
            raise InputError(f"ratio must be two positive numbers in order (got {list(ratio)})")
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)

    def train(self, sizes: Tensor, draw: Draw) -> Tensor:
        """Boxes drawn uniformly: their area, the logarithm of their shape, and their place."""
        boxes = self._largest(sizes)
        found = torch.zeros(len(sizes), dtype=torch.bool)
        for number in range(TRIES):
            area = sizes.prod(1) * draw.between(self.scale[0], self.scale[1], "area", number)
            ratio = draw.between(math.log(self.ratio[0]), math.log(self.ratio[1]), "ratio", number).exp()
            shape = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).round().long()
            fits = ((shape > 0) & (shape <= sizes)).all(1) & ~found
            free = (sizes - shape).clamp(min=0) + 1
            corner = torch.stack([draw.below(free[:, 0], "top", number), draw.below(free[:, 1], "left", number)], 1)
            boxes = torch.where(fits[:, None], torch.cat([corner, shape], 1), boxes)
            found |= fits
            if found.all():
                break
        return boxes

    def _largest(self, sizes: Tensor) -> Tensor:
        """The largest central box of an allowed shape."""
        height, width = sizes[:, 0].double(), sizes[:, 1].double()
        wide = torch.minimum(width, (height * self.ratio[1]).round()).clamp(min=1).long()
        high = torch.minimum(height, (width / self.ratio[0]).round()).clamp(min=1).long()
        return _central(sizes, high, wide)


def frame(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    """The box of an image uint8 [C, H, W] on the CPU, scaled to [C, size, size]: bilinear, smoothed where it is scaled down.

    Arguments:
        image: the image.
        box: top, left, height, width.
        size: pixels of a side of what is returned.
    """
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    if (height, width) == (size, size):
        return part
    # A copy by numpy, since torch would wake as many threads as it has to make its own, for each of those that decode.
    part = torch.from_numpy(part.numpy().copy(order="K"))
    return F.interpolate(part[None], (size, size), mode="bilinear", antialias=True)[0]


def _central(sizes: Tensor, high: Tensor, wide: Tensor) -> Tensor:
    shape = torch.stack([high, wide], 1)
    return torch.cat([(sizes - shape) // 2, shape], 1)
