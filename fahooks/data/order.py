"""The order of the examples of an epoch, and which of them each rank gets: pure functions that every loader shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one rank gets of a global batch.

    Arguments:
        index: int64 [n] on the CPU, the place of each example in its split.
        valid: bool [n] on the CPU; False where an example only fills the share up.
        count: examples of the global batch, over all ranks, without those that only fill up.
    """

    index: Tensor
    valid: Tensor
    count: int

    def only(self, valid: Tensor) -> Share:
        """The share with what is not `valid` (bool [n]) marked so."""
        return replace(self, valid=self.valid & valid)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), int64 [count]: a pure function of (seed, epoch) that reads no global generator."""
    return shuffled(count, "order", seed, epoch)


def shuffled(count: int, *key: str | int) -> Tensor:
    """A permutation of range(count), int64 [count], drawn from a private generator that `key` seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(count, generator=generator)


def shares(order: Tensor, batch_size: int, *, rank: int, world: int, equal: bool, start: int = 0) -> Iterator[Share]:
    """The shares of `rank` of the global batches order[b * batch_size : (b + 1) * batch_size].

    Arguments:
        order: int64 [N], the examples of an epoch in their order.
        batch_size: examples of a global batch; the last one may be smaller.
        rank: whose shares.
        world: how many ranks there are.
        equal: fill all shares of a batch up to the same size, as evaluation wants it. If not, they differ by one at most, and
            only a share that would be empty is filled up, with one example.
        start: how many batches to skip.
    """
    for batch in order.split(batch_size)[start:]:
        own = batch.tensor_split(world)[rank]
        size = -(-len(batch) // world) if equal else max(1, len(own))
        valid = torch.arange(size) < len(own)
        yield Share(own if size == len(own) else torch.cat([own, batch[:1].expand(size - len(own))]), valid, len(batch))
