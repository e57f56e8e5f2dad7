"""Batch Manhattan (Liao et al. 2015): gradients without their magnitude."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fahooks.hooks.base import Hook, register_hook


@register_hook("manhattan", paper="Liao et al. 2015, https://arxiv.org/abs/1510.05067")
class Manhattan(Hook):
    """Gradients become their sign before each step: with plain SGD every weight moves by the learning rate.

    Arguments:
        match: see `fahooks.Hook`.
    """

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Replace every gradient by its sign."""
        for weight in weights.values():
            if weight.grad is not None:
                weight.grad.sign_()
