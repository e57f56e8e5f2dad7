"""Optimizer and learning rate schedule of a recipe."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fahooks import recipe


def make_optimizer(model: nn.Module, config: recipe.Adam | recipe.AdamW | recipe.SGD) -> Optimizer:
    """The optimizer that `config` describes, for every parameter of `model` that requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if isinstance(config, recipe.SGD):
        return SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **common)
    kind = Adam if isinstance(config, recipe.Adam) else AdamW
    return kind(parameters, betas=config.betas, **common)


def make_schedule(optimizer: Optimizer, config: recipe.Constant | recipe.Step | recipe.Cosine, epochs: int) -> LRScheduler:
    """The schedule that `config` describes, moved on once an epoch."""
    if isinstance(config, recipe.Step):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=config.every, gamma=config.gamma)
    if isinstance(config, recipe.Cosine):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    return LambdaLR(optimizer, lambda epoch: 1.0)
