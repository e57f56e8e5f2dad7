"""Uniform sign-concordant feedback, uSF (Liao et al. 2015; Moskovitz et al. 2018, eq. 4 and 5).

B takes the signs of the live W; what differs is its magnitude. sign(0) = 0: a pruned weight sends no error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fahooks.functional import ORDINARY, is_dynamo_compiling
from fahooks.rules.base import Rule, check_positive, register_rule, weight_norm
from fahooks.rules.drawing import DrawingRule, check_draw, deviation
from fahooks.rules.feedback_alignment import FeedbackAlignment
from fahooks.rules.workspace import sign

LIAO = "Liao et al. 2015, https://arxiv.org/abs/1510.05067"

MOSKOVITZ = "Moskovitz et al. 2018, https://arxiv.org/abs/1812.06488"


@register_rule("usf", paper=LIAO)
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
        return sign(weight).mul_(self.factor)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.factor:.4g}"


@register_rule("usf_init", paper=f"{MOSKOVITZ}, eq. 4")
class SignSymmetryInit(FeedbackAlignment):
    """B = abs(B_0) sign(W), B_0 drawn once: FA-uSF Init. (eq. 4).

    Arguments:
        init: variance of B_0, see `fahooks.rules.drawing.draw`.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation of B_0.
        storage: "matrix" keeps abs(B_0), "seed" draws it anew in each backward pass, see `FeedbackAlignment`.
    """

    def draw(self, weight: Tensor, device: torch.device) -> Tensor:
        """abs(B_0), from its seed."""
        return super().draw(weight, device).abs_()

    def forward(self, weight: Tensor) -> Tensor:
        """B = abs(B_0) sign(W)."""
        return sign(weight).mul_(super().forward(weight))


@register_rule("frsf", paper=LIAO)
class SignSymmetryFixedMagnitude(SignSymmetryInit):
    """B = abs(M) sign(W), M drawn once: as `usf_init`, and uniform by default.

    Arguments:
        init: variance of M, see `fahooks.rules.drawing.draw`.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation of M.
        storage: "matrix" keeps abs(M), "seed" draws it anew in each backward pass, see `FeedbackAlignment`.
    """

    def __init__(
        self, *, init: str = "fan_out", distribution: str = "uniform", gain: float = 1.0, storage: str = "matrix"
    ) -> None:
        super().__init__(init=init, distribution=distribution, gain=gain, storage=storage)


@register_rule("brsf", paper=LIAO)
class SignSymmetryRandomMagnitude(DrawingRule):
    """B = abs(M) sign(W), M drawn anew for every backward pass of the layer.

    Arguments:
        init: variance of M, see `fahooks.rules.drawing.draw`.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation of M.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """

    def __init__(self, *, init: str = "fan_out", distribution: str = "uniform", gain: float = 1.0) -> None:
        super().__init__()
        check_draw(init, distribution, gain)
        self.init = init
        self.distribution = distribution
        self.gain = gain

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Fix the deviation of M, and note what it is drawn from."""
        super().initialise(weight, fan_in=fan_in, fan_out=fan_out, generator=generator)
        self.deviation = deviation(init=self.init, gain=self.gain, fan_in=fan_in, fan_out=fan_out)

    def forward(self, weight: Tensor) -> Tensor:
        """B = abs(M) sign(W)."""
        return self.next_draw(weight, weight.shape, self.distribution, self.deviation).abs_().mul_(sign(weight))

    def extra_repr(self) -> str:
        """The options."""
        return f"init={self.init!r}, distribution={self.distribution!r}, gain={self.gain}"


@register_rule("usf_sn", paper=f"{MOSKOVITZ}, eq. 5")
class SignSymmetryNormalized(Rule):
    """B = norm(W) sign(W) / norm(sign(W)): FA-uSF SN, strict normalization, per layer (eq. 5)."""

    def forward(self, weight: Tensor) -> Tensor:
        """B = norm(W) sign(W) / norm(sign(W)), L2 norms; zero where W is all zero."""
        if torch.is_grad_enabled():
            weight = weight.detach()
        norm, signs = weight_norm(weight), sign(weight)
        if not (weight.is_cpu and not is_dynamo_compiling() and type(weight) in ORDINARY):
            # Sums of ones are exact up to 2**24 in any order, and up to some hundred million added up side by side as here.
            sign_norm = torch.linalg.vector_norm(signs, dtype=norm.dtype)
            return signs.mul_((norm / sign_norm.clamp_min(1)).to(weight.dtype))
        # On a CPU, where nobody waits for a number, the shortest way. A factor that stays a tensor is not cast back to one, which
        # a small weight feels; that no sign is zero a product tells in half a norm's time.
        if signs.numel() < _LARGE:
            sign_norm = torch.linalg.vector_norm(signs, dtype=norm.dtype)
            return signs.mul_(norm / sign_norm if sign_norm.item() else norm)
        ones = signs.numel() if signs.prod().item() else int(signs.count_nonzero())
        return signs.mul_(norm.item() / math.sqrt(max(1, ones)))


_LARGE = 2**19
"""From this many weights on, reading them takes longer than a cast of one number."""
