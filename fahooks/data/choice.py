"""Which loader `loader: auto` is."""

from __future__ import annotations

import torch

from fahooks.data.augmentation import Augment
from fahooks.data.datasets import Dataset
from fahooks.data.examples import Images
from fahooks.data.room import decoded_bytes, free_bytes
from fahooks.plugins import loaders


def choose_loader(dataset: Dataset, augment: Augment, *, limit: int | None, device: torch.device | str) -> tuple[str, str]:
    """The name of the loader that suits a dataset on this machine, and why.

    That is `memory` for arrays, and for files that take no more than half of what is free once they are decoded; for more of
    them `ffcv` where it is installed, else `torchvision`.

    Arguments:
        dataset: what is to be fed.
        augment: what is done to its images.
        limit: how many training images are used at most; None for all.
        device: where images are wanted.
    """
    if isinstance(dataset.train, Images) and isinstance(dataset.test, Images):
        return "memory", "its images are arrays, which are in memory anyway"
    framing = augment.framing or dataset.train.framing
    count = min(limit or len(dataset.train), len(dataset.train)) + len(dataset.test)
    need = decoded_bytes(dataset.train, framing, count, whole=framing is not None and framing.random)
    have = min(free_bytes(), free_bytes(device))
    sizes = f"decoded, its {count:,} images take {need / 1e9:,.2f} GB, and {have / 1e9:,.2f} GB are free"
    if 2 * need <= have:
        return "memory", sizes
    missing = loaders.get("ffcv").target.available() if "ffcv" in loaders else "it is not part of this version"
    if missing is None:
        return "ffcv", f"{sizes}, of which it would take more than half"
    return "torchvision", f"{sizes}, of which it would take more than half; ffcv would be faster, but: {missing}"
