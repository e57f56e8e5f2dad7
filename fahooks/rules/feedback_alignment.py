"""Feedback alignment (Lillicrap et al. 2016): a fixed random feedback matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fahooks.rules.base import Rule, check_draw, draw, register_rule


@register_rule("fa", paper="Lillicrap et al. 2016, https://doi.org/10.1038/ncomms13276")
class FeedbackAlignment(Rule):
    """B^T delta with B random and fixed (eq. 3).

    Arguments:
        init: variance of B, see `fahooks.rules.base.draw`; "fan_out" is 1/N_out (Moskovitz et al. 2018, section 5.1).
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """

    matrix: Tensor

    def __init__(self, *, init: str = "fan_out", distribution: str = "normal", gain: float = 1.0) -> None:
        super().__init__()
        check_draw(init, distribution, gain)
        self.init = init
        self.distribution = distribution
        self.gain = gain

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Draw B."""
        self.register_buffer("matrix", self.draw(weight, fan_in, fan_out, generator))

    def draw(self, weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator) -> Tensor:
        """A random matrix by the rule's options, shaped like `weight`."""
        return draw(
            weight,
            init=self.init,
            distribution=self.distribution,
            gain=self.gain,
            fan_in=fan_in,
            fan_out=fan_out,
            generator=generator,
        )

    def forward(self, weight: Tensor) -> Tensor:
        """B, cast to the dtype of the call where autocast chose another."""
        return self.matrix.to(weight.dtype)

    def extra_repr(self) -> str:
        """The options."""
        return f"init={self.init!r}, distribution={self.distribution!r}, gain={self.gain}"
