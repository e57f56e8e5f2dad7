"""What can be seen in one process; several are in tests/test_distributed.py and tests/training/test_distributed.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fahooks.rules.sharding import is_sharded, reshard, sharded_like, whole


@pytest.fixture
def sharded() -> Iterator[nn.Linear]:
    """A linear map, sharded over one process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(3, 2)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        yield layer
    finally:
        dist.destroy_process_group()


def test_whole_weights_are_left_as_they_are():
    weight, matrix = nn.Linear(3, 2).weight, torch.ones(2, 3)
    assert not is_sharded(weight)
    assert whole(weight) is weight
    assert sharded_like(matrix, weight) is matrix
    reshard(nn.Linear(3, 2))


def test_a_matrix_is_sharded_as_a_weight_is_and_put_together(sharded: nn.Linear):
    matrix = torch.arange(6.0).view(2, 3)
    part = sharded_like(matrix, sharded.weight)
    assert isinstance(part, DTensor) and isinstance(sharded.weight, DTensor)
    assert (part.device_mesh, part.placements) == (sharded.weight.device_mesh, sharded.weight.placements)
    assert is_sharded(part) and torch.equal(whole(part), matrix)


def test_weights_that_a_forward_pass_put_together_are_let_go_of(sharded: nn.Linear):
    with torch.no_grad():
        sharded(torch.ones(1, 3))
    assert not is_sharded(sharded.weight), "control: nothing to let go of"
    reshard(sharded)
    assert is_sharded(sharded.weight)
