"""Backpropagation as a rule: the layer left alone, and the control that goes through the feedback path."""

from __future__ import annotations

from torch import Tensor

from fahooks.rules.base import Rule, register_rule


@register_rule("bp", paper="Rumelhart, Hinton, Williams 1986, https://doi.org/10.1038/323533a0")
class Backprop(Rule):
    """W^T delta: the true gradient; the layer is left as it is."""

    def forward(self, weight: Tensor) -> Tensor:
        """B = W."""
        return weight


@register_rule("sham", paper="control")
class Sham(Rule):
    """B = W, sent through the feedback path: must equal bp bit for bit."""

    def forward(self, weight: Tensor) -> Tensor:
        """B = W."""
        return weight
