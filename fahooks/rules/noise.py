"""Backpropagation with noise on the error (Moskovitz et al. 2018, section 5.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fahooks.rules.base import Call, DirectRule, check_positive, register_rule


@register_rule("bp_noise", paper="Moskovitz et al. 2018, https://arxiv.org/abs/1812.06488, section 5.3")
class NoisyBackprop(DirectRule):
    """W^T delta + noise: normal, mean 0, with the variance of W^T delta itself.

    The angle between the noisy error of one layer and the true one is near 45 degrees. The noise that is sent below adds up from
    layer to layer. It is drawn from torch's global generator, as dropout is.

    Arguments:
        scale: factor on the standard deviation of the noise.

    Raises:
        InputError: a scale that is not positive.
    """

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        check_positive("scale", scale)
        self.scale = scale

    def around(self, call: Call, input: Tensor) -> Tensor:
        """Apply the call to x; the error on its way to x gets the noise."""
        return call.routed(_Noise.apply(input, self.scale))

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale}"


class _Noise(torch.autograd.Function):
    """x itself; noise on the error that it gets."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return input.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None]:
        # Not the root of the variance: in float16 that of a small error is zero.
        deviation = ctx.scale * error.std(correction=0)
        return error + deviation * torch.randn_like(error), None
