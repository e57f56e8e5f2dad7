"""Weights of constant norm: "Const." in Table 1 of Moskovitz et al. 2018, and the homeostatic delay that it asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fahooks.hooks.base import Hook, Match, register_hook
from fahooks.plugins import InputError
from fahooks.rules.base import check_positive, weight_norm


@register_hook("constant_norm", paper="Moskovitz et al. 2018, eq. 10, https://arxiv.org/abs/1812.06488")
class ConstantNorm(Hook):
    """W <- norm(W_0) W / norm(W) after each step, a layer at a time, L2 norms (eq. 10).

    A weight that is all zero stays so. Weights are rounded to their dtype, and in bfloat16 so is the norm that they have.

    Arguments:
        time_constant: None, or a number of steps T: the norm n then relaxes towards that of the start,
            n <- n + (n_0 - n)(1 - exp(-1 / T)), the delay of homeostatic regulation that section 6 asks for.
        match: see `fahooks.Hook`.

    Raises:
        InputError: a time constant that is not positive; at attachment, a weight that is all zero.
    """

    def __init__(self, *, time_constant: float | None = None, match: Match = None) -> None:
        super().__init__(match=match)
        if time_constant is not None:
            check_positive("time_constant", time_constant)
        self.time_constant = time_constant

    def initialise(self, weights: Mapping[str, nn.Parameter], **about: Any) -> None:
        """Measure norm(W_0)."""
        for name, weight in weights.items():
            norm = weight_norm(weight)
            if not norm > 0:
                raise InputError(f"constant_norm: the weight of layer {name!r} has norm {norm:g}: initialise it, or leave it out")
            self.remember(name, norm)

    def after_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Scale every weight."""
        for name, weight in weights.items():
            initial, norm = self.recall(name), weight_norm(weight)
            share = 1.0 if self.time_constant is None else -math.expm1(-1 / self.time_constant)
            factor = torch.where(norm > 0, torch.lerp(norm, initial, share) / norm, 1.0)
            weight.copy_(weight.to(factor.dtype) * factor)

    def extra_repr(self) -> str:
        """The time constant."""
        return f"time_constant={self.time_constant}"
