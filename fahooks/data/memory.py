"""The `memory` loader: all images decoded once and held as uint8, on the training device where that is possible."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fahooks.data.examples import Examples, Files, Images
from fahooks.data.loader import Loader, Stream, View
from fahooks.data.order import Share
from fahooks.data.room import decoded_bytes, free_bytes
from fahooks.plugins import Failed, InputError, loaders

READ_AT_ONCE = 64


class MemoryStream(Stream):
    """Batches from uint8 images of one size that lie on the training device.

    Raises:
        InputError: a file can not be decoded.
        Failed: the device has no room for the images.
    """

    def __init__(self, examples: Examples, view: View) -> None:
        super().__init__(examples, view)
        pixels, self.valid = _held(self)
        try:
            self.pixels = pixels.to(view.device)
        except torch.OutOfMemoryError as error:
            raise Failed(
                f"{len(examples):,} images take {pixels.nbytes / 2**30:.1f} GiB, which {view.device} does not have free: "
                "use fewer with data.limit, take data.loader=torchvision, or train.device=cpu"
            ) from error

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        """The images, augmented on the training device."""
        for share in shares:
            index = share.index.to(self.pixels.device)
            pixels = self.augment(self.pixels[index], index, framed=self.framing is not None)
            yield (share if self.valid is None else share.only(self.valid[share.index])), pixels


class RaggedMemoryStream(Stream):
    """Batches from whole uint8 images of any sizes in the memory of the host, of which boxes are drawn anew in every epoch.

    Raises:
        InputError: a file can not be decoded.
    """

    def __init__(self, examples: Examples, view: View) -> None:
        super().__init__(examples, view)
        with ThreadPoolExecutor() as pool:
            self.whole = list(pool.map(self.read, range(len(examples))))

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        """Boxes cut out on the CPU, then augmented on the training device."""
        for share in shares:
            share, pixels = self.framed(share, [self.whole[place] for place in share.index.tolist()], self.epoch)
            yield share, self.augment(pixels.to(self.labels.device), share.index, framed=True)


@loaders.register("memory", summary="all images decoded once and held as uint8: the fastest, where they fit")
class MemoryLoader(Loader):
    """All images decoded once and held as uint8, on the training device where that is possible."""

    def open(self, examples: Examples, view: View) -> MemoryStream | RaggedMemoryStream:
        """A stream over `examples`.

        Raises:
            InputError: the host has no room for the images, or a file can not be decoded.
            Failed: the device has none.
        """
        framing = view.augment.framing or examples.source.framing
        whole = framing is not None and framing.random and view.training
        if isinstance(examples.source, Files):
            _require_room(examples, decoded_bytes(examples.source, framing, len(examples), whole=whole))
        return RaggedMemoryStream(examples, view) if whole else MemoryStream(examples, view)


def _held(stream: Stream) -> tuple[Tensor, Tensor | None]:
    """All images of a stream that draws no boxes, uint8 [N, C, H, W], and which of them could be decoded; None for all."""
    examples, framing = stream.examples, stream.framing
    if framing is None:
        assert isinstance(examples.source, Images)
        return examples.source.pixels[examples.places], None
    pixels = torch.zeros(len(examples), examples.shape[0], framing.size, framing.size, dtype=torch.uint8)
    valid = torch.ones(len(examples), dtype=torch.bool)

    def read(index: Tensor) -> None:
        share = Share(index, valid[index], len(index))
        share, pixels[index] = stream.framed(share, [stream.read(place) for place in index.tolist()], stream.epoch)
        valid[index] = share.valid

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, torch.arange(len(examples)).split(READ_AT_ONCE)):
            pass
    return pixels, None if valid.all() else valid


def _require_room(examples: Examples, need: int) -> None:
    if need > (have := free_bytes()):
        raise InputError(
            f"{examples.name} has {len(examples):,} images, which take {need / 1e9:,.1f} GB decoded, and this machine has "
            f"{have / 1e9:,.1f} GB of memory free: take data.loader=ffcv or torchvision, which read them from disk, or use "
            "fewer with data.limit"
        )
