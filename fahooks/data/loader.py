"""Loaders: what feeds batches. All give the same batches for the same recipe; they differ in where pixels come from.

A loader of your own is a `Loader` whose `open` gives a `Stream`, of which only `decoded` is yours to write: the order, the
shares of ranks, labels and normalisation are the same for all.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy
import torch
from torch import Tensor

from fahooks.data.augmentation import Augment
from fahooks.data.decoding import CorruptFile, CorruptFileWarning
from fahooks.data.examples import Examples
from fahooks.data.framing import frame
from fahooks.data.order import Share, epoch_order, shares


@dataclass(frozen=True)
class Batch:
    """What a stream yields: a rank's share of a global batch.

    Arguments:
        images: float32 [N, C, H, W], normalised, on the training device.
        labels: int64 [N], on the training device.
        index: int64 [N] on the CPU, the place of each example in its split.
        valid: bool [N], on the training device; False where an example is not to be learned from or counted: it only fills the
            batch up (in distributed evaluation, or for a rank that would have none), or its file was corrupt and skipped.
        count: examples of the global batch, over all ranks, without those that only fill up.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    valid: Tensor
    count: int

    def split(self, parts: int, world: int = 1) -> list[Batch]:
        """The batch in so many parts, for passes one after the other, or in fewer where it is small; `count` stays that of all.

        Arguments:
            parts: how many are wanted.
            world: how many ranks share the global batch; all of them get as many parts.
        """
        parts = max(1, min(parts, self.count // world))  # no share of a rank is smaller
        if parts == 1:
            return [self]
        cut = zip(*(tensor.tensor_split(parts) for tensor in (self.images, self.labels, self.index, self.valid)), strict=True)
        return [replace(self, images=images, labels=labels, index=index, valid=valid) for images, labels, index, valid in cut]


@dataclass(frozen=True)
class View:
    """How a split is looked at.

    Arguments:
        batch_size: examples of a global batch, over all ranks; the last batch of an epoch may be smaller.
        training: shuffled by `epoch_order` and augmented; otherwise in order, and as the finished model sees them.
        mean: what to subtract from each channel, float32 [C], in units of 0 to 255.
        std: what to divide each channel by, float32 [C]; zero counts as one.
        seed: with the epoch it fixes the order.
        device: where batches are wanted.
        channels_last: give images in that memory format.
        augment: what is done to the images; nothing by default.
        rank: which of the ranks this is.
        world: how many there are.
        corrupt: whether a file that can not be decoded raises InputError, or is named in a warning and given as a black image
            that is not valid.
    """

    batch_size: int
    training: bool
    mean: Tensor
    std: Tensor
    seed: int = 0
    device: torch.device | str = "cpu"
    channels_last: bool = False
    augment: Augment = field(default_factory=Augment)
    rank: int = 0
    world: int = 1
    corrupt: Literal["refuse", "skip"] = "refuse"


class Stream(ABC):
    """An opened split: iterating gives the batches of an epoch. A context manager, which closes it.

    Arguments:
        examples: what to feed.
        view: how.

    Attributes:
        framing: what takes a box out of each image, since the recipe says so or since files may have any size; else None.
    """

    def __init__(self, examples: Examples, view: View) -> None:
        self.examples = examples
        self.view = view
        self.framing = view.augment.framing or examples.source.framing
        self.labels = examples.labels.to(view.device)
        self.mean = view.mean.to(view.device).view(-1, 1, 1)
        self.std = torch.where(view.std > 0, view.std, 1.0).to(view.device).view(-1, 1, 1)
        self.epoch = 0
        self.start = 0
        self._skipped: set[str] = set()
        self._decoded: Generator[tuple[Share, Tensor]] | None = None

    @property
    def images(self) -> int:
        """How many examples the split has, over all ranks."""
        return len(self.examples)

    @property
    def skipped(self) -> list[str]:
        """What is wrong with each file that this stream skipped so far, sorted; those of other ranks may have skipped others."""
        return sorted(self._skipped.copy())  # while threads may add to it

    def __len__(self) -> int:
        """How many batches an epoch has, the same on every rank."""
        return -(-self.images // self.view.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what iterating gives: the batches of `epoch` from the one numbered `start` on. Evaluation knows no epochs."""
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch. Whoever stops early leaves no thread and no memory behind."""
        with closing(self.decoded(list(self._shares()))) as self._decoded:
            for share, pixels in self._decoded:
                yield self._batch(share, pixels)

    @abstractmethod
    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        """What is asked for, in that order: each share with its images as the model sees them but for normalisation.

        `read`, `framed` and `augment` below do all of it, one after the other; `augment` alone where images have one size. A
        loader that cuts boxes out while it decodes asks `boxes`. A share whose corrupt images are skipped comes back with these
        marked in `valid`.

        Arguments:
            shares: all that will be asked for, so that work can begin early.

        Returns:
            A generator of shares and pixels, uint8 [n, C, H, W], on any device. No later step may overwrite them. What it holds
            it gives back when it is closed.
        """

    def read(self, place: int) -> Tensor | None:
        """The example at `place`, uint8 [C, H, W] of its own size; None if it can not be decoded and such are skipped.

        Raises:
            CorruptFile: it can not be decoded, and such are refused.
        """
        try:
            return self.examples.read(place)
        except CorruptFile as error:
            self.skip(error)
            return None

    def skip(self, error: CorruptFile) -> None:
        """Name a file that can not be decoded in a warning, the first time that it is met.

        Raises:
            CorruptFile: `error`, where such files are refused.
        """
        if self.view.corrupt == "refuse":
            raise error
        if error.what in self._skipped:
            return
        self._skipped.add(error.what)
        warnings.warn(f"skipped: {error.what}", CorruptFileWarning, stacklevel=3)

    def boxes(self, sizes: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Which box of each image is seen, where `framing` takes one.

        Arguments:
            sizes: int64 [n, 2] on the CPU, height and width of each image.
            index: int64 [n] on the CPU, their places in the split.
            epoch: which one; boxes of evaluation do not depend on it.

        Returns:
            int64 [n, 4]: top, left, height, width.
        """
        if self.framing is None:
            raise ValueError("nothing takes boxes out of these images: see Stream.framing")
        if self.view.training and self.framing is self.view.augment.framing:
            return self.framing.train(sizes, self.view.augment.draw(self.framing, epoch, index))
        return self.framing.evaluate(sizes)

    def framed(self, share: Share, images: Sequence[Tensor | None], epoch: int) -> tuple[Share, Tensor]:
        """The share, and what `read` gave of it made one size: uint8 [n, C, size, size]; what is None is black and not valid."""
        if self.framing is None:
            raise ValueError("nothing takes boxes out of these images: see Stream.framing")
        size = self.framing.size
        there = [(1, 1) if image is None else image.shape[1:] for image in images]
        boxes = self.boxes(torch.tensor(there), share.index, epoch).tolist()
        # numpy fills and copies in this thread alone, where torch would wake as many for each of the threads that decode.
        pixels = numpy.zeros((len(images), self.examples.shape[0], size, size), numpy.uint8)
        for place, (image, box) in enumerate(zip(images, boxes, strict=True)):
            if image is not None:
                pixels[place] = frame(image, box, size).numpy()
        return share.only(torch.tensor([image is not None for image in images])), torch.from_numpy(pixels)

    def augment(self, pixels: Tensor, index: Tensor, *, framed: bool = False) -> Tensor:
        """Images uint8 [n, C, H, W] as the view wants them in this epoch, but for normalisation.

        Arguments:
            pixels: images of one size.
            index: int64 [n], their places in the split.
            framed: whether `framing` made them one size; if not, that is done here where the recipe asks for it.
        """
        if self.view.training:
            return self.view.augment.train(pixels, self.epoch, index.to(pixels.device), framed=framed)
        return self.view.augment.evaluate(pixels, framed=framed)

    def close(self) -> None:
        """End the epoch and give back all that the stream holds. Doing so twice is fine."""
        if self._decoded is not None:
            self._decoded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _shares(self) -> Iterator[Share]:
        view = self.view
        order = epoch_order(self.images, view.seed, self.epoch) if view.training else torch.arange(self.images)
        return shares(order, view.batch_size, rank=view.rank, world=view.world, equal=not view.training, start=self.start)

    def _batch(self, share: Share, pixels: Tensor) -> Batch:
        device = self.labels.device
        images = pixels.to(device, non_blocking=True).float().sub_(self.mean).div_(self.std)  # in place: float() made a copy
        memory_format = torch.channels_last if self.view.channels_last else torch.contiguous_format
        return Batch(
            images=images.contiguous(memory_format=memory_format),
            labels=self.labels[share.index.to(device)],
            index=share.index,
            valid=share.valid.to(device),
            count=share.count,
        )


class Loader(ABC):
    """Where streams come from. Options are arguments of `__init__`; registered in `fahooks.plugins.loaders`.

    An option `folder`, where a recipe does not set it, is the folder of the loader's name in data.root.
    """

    @classmethod
    def available(cls) -> str | None:
        """None if it works here; else a sentence that says why not, with the line that installs what is missing."""
        return None

    def prepare(self, examples: Examples, *, corrupt: Literal["refuse", "skip"] = "refuse") -> None:
        """Write what `open` needs on disk, once for all splits of `examples.source`; by default nothing.

        Rank 0 calls it before the other ranks do. What is there and up to date is left alone; what is there is always complete.

        Arguments:
            examples: a split of what is to be written.
            corrupt: as in `View`.

        Raises:
            InputError: it can not be written, or the examples can not be read.
        """
        return

    @abstractmethod
    def open(self, examples: Examples, view: View) -> Stream:
        """A stream over `examples`.

        Raises:
            InputError: the examples are not what this loader can feed, or do not fit.
            Failed: the device has no room for them.
        """
