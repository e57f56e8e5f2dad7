"""Weights that are sharded over processes by `fully_shard`: made whole, and other tensors sharded as they are.

All processes have to call these at the same time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "full_tensor")  # importing the class takes longer than importing fahooks


def whole(tensor: Any) -> Tensor:
    """The tensor of which each process holds a part, put together; another tensor is given back."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, weight: Any) -> Tensor:
    """A whole tensor, the same in all processes, sharded as a weight is; where that is whole, the tensor itself."""
    if not is_sharded(weight):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass put together and no backward pass has let go of."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
