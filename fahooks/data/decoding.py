"""Image files, decoded to uint8 tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fahooks.plugins import InputError, escaped


class CorruptFile(InputError):
    """A file that is not there, or is no image that can be decoded as a whole.

    Arguments:
        what: the file, what is wrong with it, and what to do about it; that it may be skipped is added.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = escaped(what)

    def __str__(self) -> str:
        return f"{self.what}, or leave such files out with data.corrupt=skip"


class CorruptFileWarning(UserWarning):
    """A file that can not be decoded was skipped."""


def decode(path: str, channels: Literal[1, 3] = 3) -> Tensor:
    """The image in a file, uint8 [channels, H, W], of its own size. Threads may decode side by side.

    Raises:
        CorruptFile: the file can not be read, is damaged, or ends too early.
    """
    import numpy
    from PIL import Image

    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(path) as file:
            pixels = numpy.array(file if file.mode == mode else file.convert(mode))
    # What Pillow raises at damaged files, and at files that would fill the memory.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise CorruptFile(f"{path} can not be decoded ({reason}): replace or remove it") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)
