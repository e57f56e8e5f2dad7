"""Memory for matrices that are gone when the backward pass of their layer is over.

Fresh memory costs a page fault every 4 KiB wherever the allocator has given the last layer's back to the system, and on a virtual
machine that can take longer than all else that a sign rule does. Whether it has depends on the order of allocations. A thread
whose allocator is known to keep what is freed (`fahooks.training.device.tune_allocator`) leaves it to that.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fahooks.functional import ORDINARY, is_dynamo_compiling

SMALLEST, LARGEST = 2**18, 2**25
"""Bytes of the matrices that are served. Smaller ones the allocator has at hand; larger ones would be much to keep."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.blocks: dict[torch.dtype, tuple[Tensor, int, int]] = {}
        """By dtype a block, the address of its storage's C++ object, and how many hold that object while nobody else does."""

        self.left_to_allocator = False


_kept = _Kept()


def leave_to_allocator() -> None:
    """Keep nothing for the calling thread from now on: its allocator keeps what is freed."""
    _kept.blocks.clear()
    _kept.left_to_allocator = True


def sign(weight: Tensor) -> Tensor:
    """The signs of a weight, as `Tensor.sign` gives them.

    On a CPU, inside of a backward pass, its memory is used again by a later call of the same thread, once nobody holds it any
    more, or left to the allocator. A thread keeps at most 32 MiB for each dtype.
    """
    if not SMALLEST <= weight.nbytes <= LARGEST or not _is_served(weight):
        return weight.sign()
    block, storage, alone = _kept.blocks.get(weight.dtype, (None, 0, 0))
    if block is None or block.numel() < weight.numel() or _holders(storage) > alone:
        block = weight.new_empty(weight.numel())
        storage = block.untyped_storage()._cdata
        _kept.blocks[weight.dtype] = block, storage, _holders(storage)
    return torch.sign(weight, out=block.as_strided(weight.shape, weight.stride()))


def _is_served(weight: Tensor) -> bool:
    """Whether the weight is an ordinary tensor on a CPU, without gaps, in a backward pass.

    Not of a thread that leaves memory to its allocator, nor where a compiler plans memory itself.
    """
    return (
        weight.is_cpu
        and not is_dynamo_compiling()
        and not _kept.left_to_allocator
        and type(weight) in ORDINARY
        and _current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and (weight.is_contiguous() or weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    )


# How many hold a storage: the block itself, the storage as an object of Python in some versions of torch, and who else.
_holders = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]
_current_graph_task_id = torch._C._current_graph_task_id  # pyright: ignore[reportAttributeAccessIssue]
