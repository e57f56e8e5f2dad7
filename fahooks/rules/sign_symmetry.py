"""Uniform sign-concordant feedback, uSF (Liao et al. 2015; Moskovitz et al. 2018, eq. 4 and 5).

B takes the signs of the live W; what differs is its magnitude. sign(0) = 0: a pruned weight sends no error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fahooks.rules.base import Rule, check_positive, register_rule
from fahooks.rules.feedback_alignment import FeedbackAlignment

MOSKOVITZ = "Moskovitz et al. 2018, https://arxiv.org/abs/1812.06488"


@register_rule("usf", paper="Liao et al. 2015, https://arxiv.org/abs/1510.05067")
class SignSymmetry(Rule):
    """B = scale x sign(W), the scale fixed.

    Arguments:
        scale: a positive number, or None for 1/sqrt(N_out), which keeps the variance of the error as section 5.1 of
            Moskovitz et al. 2018 asks. Liao et al. use 1, and Batch Manhattan against the explosion that follows.

    Raises:
        InputError: a scale that is not positive.
    """

    def __init__(self, *, scale: float | None = None) -> None:
        super().__init__()
        if scale is not None:
            check_positive("scale", scale)
        self.scale = scale
        self.factor = 1.0 if scale is None else scale

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Fix the scale."""
        if self.scale is None:
            self.factor = fan_out**-0.5

    def forward(self, weight: Tensor) -> Tensor:
        """B = scale x sign(W)."""
        return weight.sign().mul_(self.factor)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.factor:.4g}"


@register_rule("usf_init", paper=f"{MOSKOVITZ}, eq. 4")
class SignSymmetryInit(FeedbackAlignment):
    """B = abs(B_0) sign(W), B_0 drawn once: FA-uSF Init. (eq. 4).

    Arguments:
        init: variance of B_0, see `fahooks.rules.base.draw`.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation of B_0.
    """

    magnitude: Tensor

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Draw abs(B_0)."""
        self.register_buffer("magnitude", self.draw(weight, fan_in, fan_out, generator).abs_())

    def forward(self, weight: Tensor) -> Tensor:
        """B = abs(B_0) sign(W)."""
        return weight.sign().mul_(self.magnitude)


@register_rule("usf_sn", paper=f"{MOSKOVITZ}, eq. 5")
class SignSymmetryNormalized(Rule):
    """B = norm(W) sign(W) / norm(sign(W)): FA-uSF SN, strict normalization, per layer (eq. 5)."""

    def forward(self, weight: Tensor) -> Tensor:
        """B = norm(W) sign(W) / norm(sign(W)), L2 norms; zero where W is all zero."""
        signs = weight.sign()
        precision = torch.promote_types(weight.dtype, torch.float32)
        weight_norm = torch.linalg.vector_norm(weight, dtype=precision)
        sign_norm = torch.linalg.vector_norm(signs, dtype=precision).clamp_min(1)
        return signs.mul_((weight_norm / sign_norm).to(weight.dtype))
