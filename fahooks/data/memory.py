"""The `memory` loader: all images as uint8 on the training device, augmented and normalised there."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from fahooks.data.examples import Examples
from fahooks.data.loader import Loader, Stream, View
from fahooks.data.order import Share
from fahooks.plugins import InputError, loaders


class MemoryStream(Stream):
    """Batches from uint8 tensors that lie on the training device.

    Raises:
        InputError: the device has no room for the images.
    """

    def __init__(self, examples: Examples, view: View) -> None:
        super().__init__(examples, view)
        pixels = examples.source.pixels[examples.places]
        try:
            self.pixels = pixels.to(view.device)
        except torch.OutOfMemoryError as error:
            what = f"{len(examples):,} images take {pixels.nbytes / 2**30:.1f} GiB, which {view.device} does not have free"
            raise InputError(f"{what}: use fewer with data.limit, or train.device=cpu") from error

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        """The images, augmented on the training device."""
        for share in shares:
            index = share.index.to(self.pixels.device)
            yield share, self.augment(self.pixels[index], index)


@loaders.register("memory", summary="all images as uint8 on the training device, augmented there: the fastest, where they fit")
class MemoryLoader(Loader):
    """All images as uint8 on the training device, augmented there."""

    def open(self, examples: Examples, view: View) -> MemoryStream:
        """A stream over `examples`.

        Raises:
            InputError: the device has no room for the images.
        """
        return MemoryStream(examples, view)
