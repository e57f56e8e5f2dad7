"""Making a model of the zoo small: fewer blocks, small images, and no work for initial values that nobody needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGE = 2**14

ROWS = (nn.Sequential, nn.ModuleList)


class Unfilled(TorchFunctionMode):
    """While active, large parameters are not initialised, so that a model of billions of weights takes no time and no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, nn.Parameter) and first.dim() > 1 and first.numel() >= LARGE:
                return first
        return func(*args, **kwargs)


def shorten(model: nn.Module, *, keep: int, rows: tuple[type[nn.Module], ...] = ROWS) -> int:
    """Take blocks out of every row of blocks until few of each kind are left, and return how many were taken.

    Arguments:
        model: the model, changed in place; that it still runs is to be seen.
        keep: how many of a kind are left.
        rows: what counts as a row: modules of these types.
    """
    taken = 0
    for module in list(model.modules()):
        if not isinstance(module, rows):
            continue
        kinds: dict[Any, int] = {}
        follows_taken = False
        for name, block in list(module._modules.items()):
            if follows_taken and getattr(block, "inplace", False):
                del module._modules[name]  # it would overwrite what the activation before it needs in its backward pass
                continue
            if block is None or not list(block.parameters()) or not re.search(r"\d$", name):
                continue
            follows_taken = False
            kind = _kind(block)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] > keep:
                del module._modules[name]
                taken += 1
                follows_taken = isinstance(module, nn.Sequential)
        if isinstance(module, nn.ModuleList):
            module._modules = {str(i): block for i, block in enumerate(module._modules.values())}
    return taken


def _kind(block: nn.Module) -> Any:
    """What blocks that compute alike have in common: their layers, sizes and settings, but for those of dropping out."""
    return tuple(
        (
            name,
            type(module).__name__,
            re.sub(r"drop_prob=[\d.e-]+", "", module.extra_repr()),
            tuple(sorted(_settings(vars(module)))),
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
        )
        for name, module in block.named_modules()
    )


def _settings(values: dict[str, Any]) -> Iterable[tuple[str, str]]:
    plain = (int, str, tuple)
    return (
        (name, repr(value))
        for name, value in values.items()
        if isinstance(value, plain) and "drop" not in name and not re.search(r"idx|index|layer_id", name)
    )


def fill(model: nn.Module) -> nn.Module:
    """Give every parameter a value in float64: N(0, 1/N_in), and noise for what starts as a constant, so that errors pass."""
    torch.manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel() >= LARGE:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 2500
                parameter.normal_(0, fan_in**-0.5)
            elif parameter.dim() < 2 or not bool(parameter.isfinite().all()) or parameter.std() == 0:
                parameter.copy_(parameter.nan_to_num(0, 0, 0)).add_(torch.randn_like(parameter), alpha=0.1)
    return model


def images(side: int, channels: int = 3) -> Tensor:
    """Two images [2, C, side, side], float64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, side, side, dtype=torch.float64, generator=generator)
