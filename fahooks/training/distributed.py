"""Several processes that train together, as torchrun starts them: what they tell each other, and who of them speaks.

Alone, without torchrun, a process is rank 0 of 1, and everything here comes for free.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from fahooks.plugins import InputError
from fahooks.training.torchrun import started_by_torchrun

# How long ranks wait for rank 0 to download, or to write the files of a loader: a process that is gone is noticed at once.
PATIENCE = timedelta(days=7)

T = TypeVar("T")


def rank() -> int:
    """The number of this process among those that train together."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started, during the block; if it started none, nothing happens.

    They talk by NCCL where there are GPUs, one for each of a machine's processes, and by gloo otherwise. Where the block fails in
    several of them, only the first one raises; the others, which may fail for no other reason, exit without a word. A process
    that crashes, which torchrun tells by the signal alone, says where it was.
    """
    if not started_by_torchrun() or _joined():
        yield
        return
    if not faulthandler.is_enabled():
        faulthandler.enable()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        # Each attempt has a name: addresses of processes that are gone must not be found in a store that outlives them.
        store=PrefixStore(f"attempt {_attempt()}", _store()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield
    except KeyboardInterrupt:
        if rank() != 0 or somebody_failed():
            sys.exit(130)
        raise
    except Exception:
        if not fails_first():
            sys.exit(1)
        raise
    dist.destroy_process_group()


# How many failures the process outlived, as a series of runs does where the loss of one diverges.
_outlived = 0


@functools.cache
def fails_first() -> bool:
    """Say that this process fails, and learn whether it is the first one to do so; the answer stays until `outlive`."""
    return not _joined() or _store().add(_failures(), 1) == 1


def somebody_failed() -> bool:
    """Whether `fails_first` was called in any process."""
    return _joined() and _store().add(_failures(), 0) > 0


def outlive() -> None:
    """Go on after a failure that all processes have in common. All have to call it."""
    global _outlived
    _outlived += 1
    fails_first.cache_clear()


def _failures() -> str:
    return f"failures/{_attempt()}/{_outlived}"


def started_again() -> Path | None:
    """The run directory that these processes were at before torchrun had to start them again; None otherwise."""
    if not _joined() or _attempt() == 0 or not _store().check(["run"]):
        return None
    return Path(_store().get("run").decode())


def remember(run: Path) -> None:
    """Note the run directory, for processes that torchrun starts again."""
    if _joined() and rank() == 0:
        _store().set("run", str(run.absolute()))


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@functools.cache
def _store() -> Store:
    """What the processes find each other by: the store of torchrun's agent, which outlives them, or else one of rank 0's."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = os.environ["RANK"] == "0" and not agent
    return PrefixStore("fahooks", TCPStore(address, port, is_master=server, wait_for_workers=False))


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 run the block before the others do, as for a download, however long it takes."""
    if world() == 1:
        yield
        return
    group = _patient_group()
    if rank() != 0:
        dist.barrier(group=group)
    yield
    if rank() == 0:
        dist.barrier(group=group)


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))  # not a number: this rank is in it


def told(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; the others do not call it."""
    if not _joined():
        return make()
    found = [make() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    value: Any = found[0]
    return value


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks; the tensor stays as it is."""
    if world() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return flag if world() == 1 else bool(total(torch.tensor(int(flag))))


def of_every_rank(value: Any) -> list[Any]:
    """What each rank has, in order."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with `nn.SyncBatchNorm` for batch norm, whose statistics are those of all processes; alone, the model as it is.

    Raises:
        InputError: there is no GPU, without which torch can not do it, or a class of batch norm that torch and timm do not know.
    """
    if world() == 1:
        return model
    if device.type != "cuda":
        raise InputError(
            "train.sync_batchnorm=true: torch has nn.SyncBatchNorm on GPUs alone, and this runs on the CPU: leave it away"
        )
    return with_sync_batchnorm(model)


def with_sync_batchnorm(model: nn.Module) -> nn.Module:
    """The model with its batch norms, those of timm that hold an activation among them, replaced by synchronised ones.

    Raises:
        InputError: a batch norm is of another class, which the conversion would lose.
    """
    from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm  # timm is slow to import

    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in known:
            what = f"train.sync_batchnorm=true: {name!r} is a {type(module).__name__}, for which there is no synchronised one"
            raise InputError(f"{what}: leave it away")
    return convert_sync_batchnorm(model)


def shards(kind: str) -> bool:
    """Whether `wrap` leaves each rank with a part of the parameters."""
    return kind == "fsdp2" and _joined()


def wrap(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """What to call for a forward pass, so that gradients are averaged over the ranks.

    Arguments:
        model: the same on every rank.
        kind: "ddp", which wraps it; or "fsdp2", after which the model itself holds a part of its parameters on each rank: make
            the optimizer afterwards.
        device: where it is.
    """
    if shards(kind):
        shard(model, device)
        return model
    if not _joined():
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def shard(model: nn.Module, device: torch.device) -> None:
    """Apply `fully_shard` to the blocks of a model and to the rest of it.

    Blocks are the members of its outermost lists: `nn.Sequential` and `nn.ModuleList`.
    """
    mesh = init_device_mesh(device.type, (world(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the parameters."""
    return isinstance(model, FSDPModule)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _blocks(child)


def reducing(wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Average the gradients of the pass inside over the ranks; only those of the `last` of a step, which has the sum."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return nullcontext()


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, such as running statistics, but for those of rules, which are the same already."""
    if world() == 1:
        return
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, buffer in model.named_buffers():
        if name not in ignored:
            dist.broadcast(buffer, src=0)


def whole(state: T) -> T:
    """A state with what is sharded made whole, on the CPU. All ranks have to call it."""
    return pytree.tree_map_only(DTensor, lambda value: value.full_tensor().cpu(), state)


def sharded(state: Any, like: Any) -> Any:
    """A whole state with every tensor sharded as its counterpart in `like` is."""
    if isinstance(like, DTensor) and isinstance(state, Tensor):
        return distribute_tensor(state.to(like.device), like.device_mesh, like.placements)
    if isinstance(like, Mapping) and isinstance(state, Mapping):
        return {key: sharded(value, like.get(key)) for key, value in state.items()}
    if isinstance(like, list | tuple) and isinstance(state, list | tuple) and len(like) == len(state):
        return [sharded(value, other) for value, other in zip(state, like, strict=True)]
    return state


class Whole:
    """A part of a run whose state is whole in checkpoints, so that any number of processes can go on from it.

    Arguments:
        part: has a state, maybe a sharded one.
    """

    def __init__(self, part: Any) -> None:
        self.part = part

    def state_dict(self) -> Any:
        """The state, whole."""
        return whole(self.part.state_dict())

    def load_state_dict(self, state: Any) -> None:
        """Go on from a whole state."""
        self.part.load_state_dict(sharded(state, self._like(state)))

    def _like(self, state: Any) -> Any:
        if not isinstance(self.part, torch.optim.Optimizer):
            return self.part.state_dict()
        parameters = [parameter for group in self.part.param_groups for parameter in group["params"]]
        return {
            "state": {
                number: {name: parameters[number] for name, value in values.items() if _same_shape(value, parameters[number])}
                for number, values in state["state"].items()
            }
        }


def _same_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
