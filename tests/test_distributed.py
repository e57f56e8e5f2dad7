"""Converted models in two processes: the gradients are those of one process with the joined batch."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import targets
from fahooks.training import distributed

WORLD = 2

RULES = ["fa", "usf", "usf_init", "usf_sn", "frsf", "brsf", "sham", "dfa", "dense_fa", "drtp", "kp"]

SHARDED = ["fa", "usf", "usf_init", "usf_sn", "frsf", "brsf", "sham", "dfa", "dense_fa", "drtp"]


class Network(nn.Module):
    """Two convolutions and two linear maps in blocks, whose activations are computed twice where it is `checkpointed`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh()),
                nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten()),
                nn.Sequential(nn.Linear(32, 16), nn.Tanh()),
            ]
        )
        self.head = nn.Linear(16, 4)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)  # pyright: ignore[reportAssignmentType]
        return self.head(x)


def network() -> Network:
    model = Network().double()
    with torch.no_grad():
        model.blocks[1][0].weight[0, 0, 0, 0] = 0  # pyright: ignore[reportIndexIssue]
    return model


def converted(rule: str) -> Network:
    model = network()
    fahooks.convert(model, rule)
    return model


def shard(model: Network) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 6, 6, generator=generator).double(), torch.tensor([0, 1, 2, 3, 1, 0])


def learn(model: nn.Module, network: nn.Module, images: Tensor, labels: Tensor, rule: str) -> None:
    """One pass each way; drtp is told the labels."""
    around: Any = targets(network, labels) if rule == "drtp" else torch.enable_grad()
    with around:
        torch.nn.functional.cross_entropy(model(images), labels).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    return {name.removeprefix("module."): grad for name, grad in whole.items()}


def in_one_process(rule: str) -> dict[str, Tensor]:
    model = converted(rule)
    learn(model, model, *samples(), rule)
    return gradients(model)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `everything` returns in each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # Folders of models that other tests loaded from files may hold modules named like those of Python.
        patch.setattr(sys, "path", [path for path in sys.path if "pytest-of-" not in path])
        mp.spawn(_process, (port, folder), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save(everything(rank), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    distributed.leave(0)


def everything(rank: int) -> dict[str, Any]:
    return {
        "ddp": {rule: by_ddp(rank, rule) for rule in RULES},
        "fsdp, kept": {rule: by_fsdp(rank, rule) for rule in SHARDED},
        "fsdp, recomputed": {rule: by_fsdp(rank, rule, checkpointed=True) for rule in SHARDED},
        "fsdp, converted last": {rule: by_fsdp(rank, rule, sharded_first=True) for rule in SHARDED},
        "refused": refused_where_sharded(rank),
        "buffers": buffers_after_a_pass(rank),
    }


def by_ddp(rank: int, rule: str) -> dict[str, Tensor]:
    network = converted(rule)
    model = DistributedDataParallel(network)
    images, labels = (part.chunk(WORLD)[rank] for part in samples())
    learn(model, network, images, labels, rule)
    return gradients(model)


def by_fsdp(rank: int, rule: str, *, checkpointed: bool = False, sharded_first: bool = False) -> dict[str, Tensor]:
    model = network() if sharded_first else converted(rule)
    model.checkpointed = checkpointed
    shard(model)
    if sharded_first:
        fahooks.convert(model, rule)
    images, labels = (part.chunk(WORLD)[rank] for part in samples())
    learn(model, model, images, labels, rule)
    return gradients(model)


def refused_where_sharded(rank: int) -> dict[str, str]:
    refusals = {}
    for rule, hooks in (("kp", []), ("wm", []), ("fa", ["alignment"])):
        model = converted(rule)
        shard(model)
        try:
            fahooks.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), *hooks)
        except InputError as error:
            refusals[hooks[0] if hooks else rule] = str(error)
    return refusals


def buffers_after_a_pass(rank: int) -> dict[str, Tensor]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4))
    fahooks.convert(network, "fa")
    model = DistributedDataParallel(network)
    own: Any = network
    with torch.no_grad():
        own[3].feedback.matrix.fill_(rank)
        own[1].running_mean.fill_(rank)
    model(samples()[0].float())
    return {"B": own[3].feedback.matrix, "mean": own[1].running_mean}


def test_data_parallel_gradients_are_those_of_the_joined_batch(found: list[dict[str, Any]]) -> None:
    for rule in RULES:
        for process in found:
            torch.testing.assert_close(process["ddp"][rule], in_one_process(rule), rtol=1e-10, atol=1e-12)
    different = torch.linalg.vector_norm(in_one_process("fa")["blocks.0.0.weight"] - in_one_process("sham")["blocks.0.0.weight"])
    assert different > 1e-3, "control: rules do not differ from backpropagation"


@pytest.mark.parametrize("way", ["kept", "recomputed", "converted last"])
def test_fully_sharded_gradients_are_those_of_the_joined_batch(found: list[dict[str, Any]], way: str) -> None:
    for rule in SHARDED:
        for process in found:
            torch.testing.assert_close(process[f"fsdp, {way}"][rule], in_one_process(rule), rtol=1e-10, atol=1e-12)


def test_what_needs_whole_weights_says_so_where_they_are_sharded(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["refused"].keys() == {"kp", "wm", "alignment"}
        for message in process["refused"].values():
            assert "is sharded (fully_shard): use DistributedDataParallel" in message


def test_feedback_is_not_broadcast_and_other_buffers_are(found: list[dict[str, Any]]) -> None:
    first, second = (process["buffers"] for process in found)
    assert (first["B"] == 0).all() and (second["B"] == 1).all()
    assert (second["mean"] < 0.5).all(), "control: rank 1 has its own running mean"


def test_revert_leaves_the_broadcast_as_it_was() -> None:
    model = Network()
    fahooks.convert(model, "fa")
    assert "head.feedback.matrix" in model._ddp_params_and_buffers_to_ignore  # pyright: ignore[reportOperatorIssue]
    fahooks.revert(model)
    assert "_ddp_params_and_buffers_to_ignore" not in vars(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.bias"])
    fahooks.convert(model, "fa")
    fahooks.convert(model, "usf")
    assert model._ddp_params_and_buffers_to_ignore == ["head.bias"]
