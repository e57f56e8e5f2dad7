"""Frozen excitatory and inhibitory connections: E/I in Table 1 of Moskovitz et al. 2018."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fahooks.hooks.base import Hook, Match, register_hook
from fahooks.plugins import InputError


@register_hook("freeze_signs", paper="Moskovitz et al. 2018, section 4 (E/I), https://arxiv.org/abs/1812.06488")
class FreezeSigns(Hook):
    """From a given step on every weight stays on the side of zero that it is on.

    A weight that is zero when signs freeze takes the side of its first value that is not.

    Arguments:
        after: when signs freeze: an int is a number of optimizer steps, 0 for those of the start; a float between 0 and 1 is a
            fraction of training, for which `attach` needs `total_steps`. Section 4 freezes them after 5 % of training.
        margin: how far from zero a weight is kept; at least the smallest normal number of its dtype.
        match: see `fahooks.Hook`.

    Raises:
        InputError: `after` or `margin` is no such number; at attachment, a fraction without `total_steps`, or a step
            after the last one.
    """

    def __init__(self, *, after: int | float = 0.05, margin: float = 1e-8, match: Match = None) -> None:
        super().__init__(match=match)
        steps = isinstance(after, int) and not isinstance(after, bool) and after >= 0
        if not steps and not (isinstance(after, float) and 0 < after < 1):
            raise InputError(
                "after must be a number of steps, a whole one (after=0 is the start), or a fraction of training above 0 and "
                f"below 1, got {after!r}"
            )
        check_margin(margin)
        self.after = after
        self.margin = margin
        self.start = after
        self._settled: set[str] = set()

    def initialise(self, weights: Mapping[str, nn.Parameter], *, total_steps: int | None, **about: Any) -> None:
        """Fix the step, and the sides if it is the first."""
        self._settled.clear()
        if isinstance(self.after, float):
            if total_steps is None:
                raise InputError(
                    f"freeze_signs: after={self.after} is a fraction of training: give attach total_steps, or after as a number "
                    "of steps"
                )
            self.start = self._start(total_steps)
        for name, weight in weights.items():
            self.remember(name, torch.zeros_like(weight, requires_grad=False))
        self.after_step(weights)

    def begins(self, total_steps: int) -> int:
        """The step after which weights are first clipped."""
        return max(1, self._start(total_steps))

    def _start(self, total_steps: int) -> int:
        return round(self.after * total_steps) if isinstance(self.after, float) else self.after

    def after_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Clip the weights that crossed zero."""
        if self.steps < self.start:
            return
        for name, weight in weights.items():
            side = self.recall(name)
            if name not in self._settled:
                side.copy_(torch.where(side == 0, weight.sign(), side))
                # Asked only until every weight has its side: the host waits for the device here.
                if side.all():
                    self._settled.add(name)
            keep_side(weight, side, self.margin)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take the sides of a checkpoint, in which weights may still be free."""
        self._settled.clear()
        return super().load_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The options."""
        return f"after={self.after}, margin={self.margin}"


def keep_side(weight: Tensor, side: Tensor, margin: float) -> None:
    """Clip, in place, every weight to at least `margin` above zero where `side` is 1, and below where it is -1.

    Arguments:
        weight: the weight.
        side: 1, -1, or 0 where the weight is 0; of the weight's dtype, and a shape that broadcasts to the weight's.
        margin: distance from zero, raised to the smallest normal number of the weight's dtype where it is less.
    """
    least = max(margin, torch.finfo(weight.dtype).tiny)
    weight.mul_(side).clamp_min_(least).mul_(side)


def check_margin(margin: object) -> None:
    """Refuse a margin that is not a finite number of at least 0.

    Raises:
        InputError: names the value.
    """
    if isinstance(margin, bool) or not (isinstance(margin, int | float) and math.isfinite(margin) and margin >= 0):
        raise InputError(f"margin must be a number of at least 0, got {margin!r}")
