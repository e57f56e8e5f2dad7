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
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import targets
from fahooks.training.torchrun import leave

WORLD = 2
ALONE = None

RULES = ["fa", "usf", "usf_init", "usf_sn", "frsf", "brsf", "sham", "dfa", "dense_fa", "drtp", "kp"]


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
    leave(0)


def everything(rank: int) -> dict[str, Any]:
    return {
        "ddp": {rule: by_ddp(rank, rule) for rule in RULES},
        "fsdp, kept": {rule: by_fsdp(rank, rule) for rule in RULES},
        "fsdp, recomputed": {rule: by_fsdp(rank, rule, checkpointed=True) for rule in RULES},
        "fsdp, converted last": {rule: by_fsdp(rank, rule, sharded_first=True) for rule in RULES},
        "computed": refused_where_sharded_and_computed(rank),
        "probe": probe_sharded(rank),
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


def refused_where_sharded_and_computed(rank: int) -> dict[str, str]:
    """What rules say that learn beside a weight which its layer standardises."""
    refusals = {}
    for rule in ("kp", "wm"):
        model = network()
        model.blocks[1][0] = StdConv2d(8, 8, 3, stride=2, padding=0, groups=2).double()  # pyright: ignore[reportIndexIssue]
        fahooks.convert(model, rule)
        shard(model)
        fahooks.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        try:
            learn(model, model, *samples(), rule)
        except InputError as error:
            refusals[rule] = str(error)
    return refusals


def probe_sharded(rank: Any) -> dict[str, Any]:
    """A probe's measurements of a model that has taken a step, and what it did to the model's gradients."""
    model = converted("fa")
    if rank is not ALONE:
        shard(model)
    images, labels = (part if rank is ALONE else part.chunk(WORLD)[rank] for part in samples())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fahooks.probe(model, total=None if rank is ALONE else total) as p:
        learn(model, model, images, labels, "fa")
        optimizer.step()
        before = gradients(model)
        with torch.no_grad():
            model(images)  # leaves the root's weights whole
        p.measure(lambda: torch.nn.functional.cross_entropy(model(images), labels))
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)
    return {"angle": p.angle, "norm_ratio": p.norm_ratio, "weight_angle": p.weight_angle, "sign_flips": p.sign_flips}


def total(value: Tensor) -> Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value


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
    for rule in RULES:
        for process in found:
            torch.testing.assert_close(process[f"fsdp, {way}"][rule], in_one_process(rule), rtol=1e-10, atol=1e-12)


def test_a_rule_that_learns_beside_a_sharded_weight_refuses_one_that_is_computed(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["computed"].keys() == {"kp", "wm"}
        for message in process["computed"].values():
            assert "'blocks.1.0' computes its weight from its parameter (weight standardisation)" in message


def test_a_probe_of_sharded_weights_measures_the_joined_batch(found: list[dict[str, Any]]) -> None:
    alone = probe_sharded(ALONE)
    for process in found:
        for quantity, by_layer in alone.items():
            assert process["probe"][quantity] == pytest.approx(by_layer, rel=1e-10), quantity
    assert alone["angle"]["blocks.0.0"] > 1 and any(alone["sign_flips"].values()), "control: there is something to measure"


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
