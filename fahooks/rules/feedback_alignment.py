"""Feedback alignment (Lillicrap et al. 2016): a fixed random feedback matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fahooks.rules.base import Rule, check_choice, register_rule
from fahooks.rules.drawing import as_weight, check_draw, deviation, random_matrix, seed_of


@register_rule("fa", paper="Lillicrap et al. 2016, https://doi.org/10.1038/ncomms13276")
class FeedbackAlignment(Rule):
    """B^T delta with B random and fixed (eq. 3).

    Arguments:
        init: variance of B, see `fahooks.rules.drawing.draw`; "fan_out" is 1/N_out (Moskovitz et al. 2018, section 5.1).
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.
        storage: "matrix" keeps B, as much memory as the weights take, in the state_dict too. "seed" keeps nothing and draws the
            same B anew in each backward pass (a GPU draws other numbers than a CPU); since no checkpoint holds it, a model
            that loads one must have been converted with the same seed.

    Raises:
        InputError: an unknown `init`, `distribution` or `storage`, or a gain that is not positive.
    """

    matrix: Tensor

    def __init__(
        self, *, init: str = "fan_out", distribution: str = "normal", gain: float = 1.0, storage: str = "matrix"
    ) -> None:
        super().__init__()
        check_draw(init, distribution, gain)
        check_choice("storage", storage, ("matrix", "seed"))
        self.init = init
        self.distribution = distribution
        self.gain = gain
        self.storage = storage

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Note what B is drawn from, and draw it if it is kept."""
        self.seed = seed_of(generator)
        self.deviation = deviation(init=self.init, gain=self.gain, fan_in=fan_in, fan_out=fan_out)
        if self.storage == "matrix":
            self.register_buffer("matrix", as_weight(self.draw(weight, torch.device("cpu")), weight))

    def draw(self, weight: Tensor, device: torch.device) -> Tensor:
        """B from its seed, float32, of the shape of `weight`."""
        return random_matrix(weight.shape, device, self.distribution, self.deviation, self.seed)

    def forward(self, weight: Tensor) -> Tensor:
        """B, cast to the dtype of the call where autocast chose another."""
        matrix = self._buffers.get("matrix")
        if matrix is None:
            matrix = self.draw(weight, weight.device)
        return matrix if matrix.dtype == weight.dtype else matrix.to(weight.dtype)

    def extra_repr(self) -> str:
        """The options."""
        return f"init={self.init!r}, distribution={self.distribution!r}, gain={self.gain}, storage={self.storage!r}"
