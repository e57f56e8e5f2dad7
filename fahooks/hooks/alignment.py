"""The penalty that pulls weights towards fixed random targets: BP + Alignment in Table 1 of Moskovitz et al. 2018."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fahooks.hooks.base import Hook, Match, register_hook
from fahooks.rules.base import check_positive
from fahooks.rules.drawing import check_draw, draw
from fahooks.rules.sharding import sharded_like
from fahooks.surgery.choice import fans
from fahooks.surgery.sites import Site


@register_hook("alignment", paper="Moskovitz et al. 2018, eq. 9, https://arxiv.org/abs/1812.06488")
class Alignment(Hook):
    """Adds the gradient of strength x sum((W - V)^2), V random and fixed (eq. 9): 2 strength (W - V).

    The loss that training code computes stays as it is, without the penalty.

    Arguments:
        strength: lambda of eq. 9.
        init: variance of V, which is normal with mean 0, see `fahooks.rules.drawing.draw`; "fan_in" is 1/N_in, that of the
            forward weights in section 5.1.
        match: see `fahooks.Hook`.

    Raises:
        InputError: a strength that is not positive, or an unknown `init`.
    """

    def __init__(self, *, strength: float = 0.001, init: str = "fan_in", match: Match = None) -> None:
        super().__init__(match=match)
        check_positive("strength", strength)
        check_draw(init, "normal", 1.0)
        self.strength = strength
        self.init = init

    def initialise(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        sites: Mapping[str, Site],
        generator_for: Callable[[str], torch.Generator],
        **about: Any,
    ) -> None:
        """Draw V, of which each process keeps the part that belongs to its part of a sharded weight."""
        for name, weight in weights.items():
            fan_in, fan_out = fans(sites[name], weight)
            target = draw(
                weight,
                init=self.init,
                distribution="normal",
                gain=1.0,
                fan_in=fan_in,
                fan_out=fan_out,
                generator=generator_for(name),
            )
            self.remember(name, sharded_like(target, weight))

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Add 2 strength (W - V) to every gradient."""
        factor = 2 * self.strength
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=factor).sub_(self.recall(name), alpha=factor)

    def extra_repr(self) -> str:
        """The options."""
        return f"strength={self.strength}, init={self.init!r}"
