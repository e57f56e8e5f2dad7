"""Optimizer and learning rate schedule of a recipe."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fahooks import recipe


def make_optimizer(model: nn.Module, config: recipe.Adam | recipe.AdamW | recipe.SGD, *, scaled: bool = False) -> Optimizer:
    """The optimizer that `config` describes, for every parameter of `model` that requires a gradient.

    Arguments:
        model: the model.
        config: what it is.
        scaled: whether a GradScaler may skip steps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # torch knows no fused step for some optimizers where parameters are sharded.
    fused = not any(isinstance(p, DTensor) for p in parameters)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if isinstance(config, recipe.SGD):
        optimizer = SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **common)
        if scaled and fused and config.momentum:
            # If its first step is skipped, a fused SGD goes on with momentum that it never wrote.
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters})
    else:
        optimizer = (Adam if isinstance(config, recipe.Adam) else AdamW)(parameters, betas=config.betas, **common)
    optimizer.register_load_state_dict_pre_hook(partial(_keep_fused, fused))
    return optimizer


def _keep_fused(fused: bool, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to go on from, with steps fused as they are here, not as where it was saved."""
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def make_schedule(
    optimizer: Optimizer, config: recipe.Constant | recipe.Step | recipe.Cosine, *, epochs: int, steps: int
) -> LRScheduler:
    """The schedule that `config` describes, moved on after every step.

    Arguments:
        optimizer: whose learning rates it sets.
        config: what it is.
        epochs: of the whole training.
        steps: optimizer steps an epoch.
    """

    def factor(step: int) -> float:
        warmup = config.warmup * steps
        return min(1.0, (step + 1) / warmup if warmup else 1.0) * _factor(config, step // steps, epochs)

    schedule = LambdaLR(optimizer, factor)
    # It goes by epochs, also in a step that a GradScaler skips, of which torch would warn where that is the first one.
    optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
    return schedule


def _factor(config: recipe.Constant | recipe.Step | recipe.Cosine, epoch: int, epochs: int) -> float:
    """What the learning rate is multiplied by after `epoch` of `epochs` epochs."""
    if isinstance(config, recipe.Step):
        return config.gamma ** (epoch // config.every)
    if isinstance(config, recipe.Cosine):
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    return 1.0
