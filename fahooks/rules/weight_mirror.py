"""Weight mirrors: B learns from what noise does on its way through the layer (Akrout et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fahooks.plugins import InputError
from fahooks.rules.base import LearningRule, check_positive, register_rule
from fahooks.rules.drawing import DrawingRule
from fahooks.rules.feedback_alignment import FeedbackAlignment
from fahooks.rules.sharding import whole


@register_rule("wm", paper="Akrout et al. 2019, https://arxiv.org/abs/1904.05391")
class WeightMirror(LearningRule, DrawingRule, FeedbackAlignment):
    """B^T delta with B that mirrors W: after each optimizer step noise x is sent through the layer, and B learns by Hebb's rule.

    With x of mean 0 and variance 1, y = W x, averaged over some samples,

        B <- (1 - rate) B + rate y x^T

    of which the expectation is W. A convolution is sent patches of noise of its kernel's size. `fahooks.attach(model,
    optimizer)` makes it learn.

    Arguments:
        rate: of learning and of forgetting, in (0, 1].
        samples: how many x a step.
        init: variance of the initial B, see `fahooks.rules.drawing.draw`.
        distribution: "normal" or "uniform", mean 0, of the initial B.
        gain: factor on the standard deviation of the initial B.

    Raises:
        InputError: an option has no such value.
    """

    def __init__(
        self,
        *,
        rate: float = 0.01,
        samples: int = 128,
        init: str = "fan_out",
        distribution: str = "normal",
        gain: float = 1.0,
    ) -> None:
        super().__init__(init=init, distribution=distribution, gain=gain)
        check_positive("rate", rate)
        check_positive("samples", samples)
        if not isinstance(samples, int):
            raise InputError(f"samples must be a whole number, got {samples!r}")
        if rate > 1:
            raise InputError(f"rate must be at most 1, which forgets the old B, got {rate!r}")
        self.rate = rate
        self.samples = samples

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Draw the initial B, and note what the noise is drawn from."""
        DrawingRule.initialise(self, weight, fan_in=fan_in, fan_out=fan_out, generator=generator)
        FeedbackAlignment.initialise(self, weight, fan_in=fan_in, fan_out=fan_out, generator=generator)

    def after_step(self, weight: nn.Parameter) -> None:
        """Send noise through W, and let B learn."""
        units = whole(weight.detach()).flatten(1)
        noise = self.next_draw(units, (self.samples, units.shape[1]), "normal", 1.0)
        mirrored = (noise @ units.t()).t() @ noise / self.samples
        self.matrix.lerp_(mirrored.view(self.matrix.shape), self.rate)

    def extra_repr(self) -> str:
        """The options."""
        return f"rate={self.rate}, samples={self.samples}, {FeedbackAlignment.extra_repr(self)}"
