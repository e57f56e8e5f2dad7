"""The `memory` loader: all images as uint8 on the training device, augmented and normalised there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fahooks.data.augmentation import Augment
from fahooks.data.datasets import Images
from fahooks.data.order import Batch, epoch_order
from fahooks.plugins import InputError, loaders


@loaders.register("memory")
class MemoryLoader:
    """Batches from uint8 tensors that lie on the training device.

    Arguments:
        images: what to feed.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        mean: what to subtract from each channel, float32 [C], in units of 0 to 255.
        std: what to divide each channel by, float32 [C]; zero counts as one.
        seed: with the epoch it fixes the order.
        augment: what is done to the images; nothing by default.
        device: where the batches are.
        channels_last: give images in that memory format.

    Raises:
        InputError: the device has no room for the images.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        augment: Augment | None = None,
    ) -> None:
        try:
            self.pixels = images.pixels.to(device)
        except torch.OutOfMemoryError as error:
            what = f"{len(images):,} images take {images.pixels.nbytes / 2**30:.1f} GiB, which {device} does not have free"
            raise InputError(f"{what}: use fewer with data.limit, or train.device=cpu") from error
        self.labels = images.labels.to(device)
        self.batch_size = batch_size
        self.mean = mean.to(device).view(-1, 1, 1)
        self.std = torch.where(std > 0, std, 1.0).to(device).view(-1, 1, 1)
        self.seed = seed
        self.augment = augment or Augment()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def images(self) -> int:
        """How many images an epoch has."""
        return len(self.labels)

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return -(-self.images // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Every image once, augmented for training, in an order that is a pure function of (seed, epoch)."""
        return self._batches(epoch_order(self.images, self.seed, epoch), lambda pixels, at: self.augment.train(pixels, epoch, at))

    def in_order(self) -> Iterator[Batch]:
        """Every image once, as they lie, and as they are evaluated: nothing is random."""
        return self._batches(torch.arange(self.images), lambda pixels, _: self.augment.evaluate(pixels))

    def _batches(self, order: Tensor, changed: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Batch]:
        for index in order.split(self.batch_size):
            here = index.to(self.pixels.device)
            images = (changed(self.pixels[here], here).float() - self.mean) / self.std
            yield Batch(images.contiguous(memory_format=self.memory_format), self.labels[here], index)
