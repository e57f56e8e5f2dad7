"""Chance in augmentation: numbers that are a pure function of a key and of an image's place, and of no random stream."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Numbers for a batch, each a pure function of its image and of the key.

    Arguments:
        index: int64 [N], the place of each image in its split.
        key: what else the numbers depend on, such as seed and epoch.
    """

    index: Tensor
    key: tuple[str | int, ...]

    def below(self, count: int | Tensor, *key: str | int) -> Tensor:
        """int64 [N], uniform in range(count), for count up to 2**31; different for different `key`.

        Arguments:
            count: one for all images, or int64 [N].
            key: what the numbers are for.
        """
        digest = hashlib.blake2b(repr((*self.key, *key)).encode(), digest_size=8).digest()
        bits = _splitmix64(int.from_bytes(digest, "little", signed=True) + _GOLDEN * (self.index + 1))
        return _shifted(_shifted(bits, 32) * count, 32)

    def between(self, low: float, high: float, *key: str | int) -> Tensor:
        """float64 [N], uniform between `low` and `high`, in steps of a 2**31st of their distance."""
        return low + (high - low) * (self.below(2**31, *key).double() / 2**31)


# SplitMix64 (Steele, Lea, Flood 2014) read at any place of its stream. int64 arithmetic wraps alike on every device.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _splitmix64(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ _shifted(state, 27)) * (0x94D049BB133111EB - 2**64)
    return state ^ _shifted(state, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """The 64 bits moved right, zeros coming in: torch's own shift brings in the sign."""
    return torch.bitwise_and(bits >> by, (1 << (64 - by)) - 1)
