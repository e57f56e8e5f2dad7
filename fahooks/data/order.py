"""The order of the examples of an epoch: one pure function that every loader shares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a loader yields.

    Arguments:
        images: float32 [N, C, H, W], normalised, on the training device.
        labels: int64 [N], on the training device.
        index: int64 [N] on the CPU, the place of each example in its split.
    """

    images: Tensor
    labels: Tensor
    index: Tensor


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), int64 [count]: a pure function of (seed, epoch) that reads no global generator."""
    return shuffled(count, "order", seed, epoch)


def shuffled(count: int, *key: str | int) -> Tensor:
    """A permutation of range(count), int64 [count], drawn from a private generator that `key` seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(count, generator=generator)
