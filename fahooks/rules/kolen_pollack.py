"""The Kolen-Pollack rule: B learns by the same update as W (Kolen, Pollack 1994; Akrout et al. 2019)."""

from __future__ import annotations

import copy

from torch import nn
from torch.optim import LBFGS, Optimizer

from fahooks.plugins import InputError
from fahooks.rules.base import LearningRule, register_rule
from fahooks.rules.feedback_alignment import FeedbackAlignment
from fahooks.rules.sharding import is_sharded, sharded_like, whole


@register_rule("kp", paper="Kolen, Pollack 1994; Akrout et al. 2019, https://arxiv.org/abs/1904.05391")
class KolenPollack(LearningRule, FeedbackAlignment):
    """B^T delta with B that gets every update that W gets, so that weight decay lets the two meet.

    With learning rate eta and weight decay lambda, under SGD

        W <- (1 - eta lambda) W - eta dJ/dW
        B <- (1 - eta lambda) B - eta dJ/dW

    so that W - B shrinks by 1 - eta lambda a step. `fahooks.attach(model, optimizer)` puts B into the parameter group of W, with
    the gradient of W as its own: it gets the momentum, the adaptive step, the weight decay and the learning rate of any
    optimizer. Without weight decay W - B stays as it is. Where W is sharded (`fully_shard`), what the optimizer updates is a part
    of B, as of W, and B is put together after each step.

    Arguments:
        init: variance of the initial B, see `fahooks.rules.drawing.draw`.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """

    def __init__(self, *, init: str = "fan_out", distribution: str = "normal", gain: float = 1.0) -> None:
        super().__init__(init=init, distribution=distribution, gain=gain)

    def attach(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Put B into the parameter group of W.

        Raises:
            InputError: the optimizer is an LBFGS that has stepped: its memory is one vector of all parameters, without B.
        """
        if isinstance(optimizer, LBFGS) and any(optimizer.state.values()):
            raise InputError(f"{self.label}: an LBFGS that has stepped can take in no B: attach to a new one")
        super().attach(weight, optimizer)
        self.updated = sharded_like(self.matrix, weight)
        _group(weight, optimizer)["params"].append(self.updated)
        # Momentum that W has gathered, and what Adagrad prepares when it is made, are B's as well.
        if optimizer.state.get(weight) and self.updated not in optimizer.state:
            optimizer.state[self.updated] = copy.deepcopy(optimizer.state[weight])

    def before_step(self, weight: nn.Parameter) -> None:
        """Give B the gradient of W.

        Raises:
            InputError: B is another tensor than the one that the optimizer updates.
        """
        if is_sharded(self.updated):
            self.updated.copy_(sharded_like(self.matrix, weight))  # a checkpoint may have been loaded
        elif self.matrix is not self.updated:
            raise InputError(f"{self.label}: the B of {self.name!r} was moved or replaced after fahooks.attach: attach again")
        # A copy: some optimizers write to the gradients, such as SGD with foreach and Nesterov momentum, and would do so twice.
        self.updated.grad = None if weight.grad is None else weight.grad.detach().clone()

    def after_step(self, weight: nn.Parameter) -> None:
        """Let the gradient of B go, and put B together where it was updated in parts."""
        self.updated.grad = None
        if is_sharded(self.updated):
            self.matrix.copy_(whole(self.updated))

    def detach(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Take B, and what the optimizer keeps of it, out again."""
        super().detach(weight, optimizer)
        parameters = _group(weight, optimizer)["params"]
        # In place: some optimizers hold on to the list itself.
        parameters[:] = [parameter for parameter in parameters if parameter is not self.updated]
        optimizer.state.pop(self.updated, None)
        if isinstance(optimizer, LBFGS):  # what it remembers is of all parameters together, B among them: it begins anew
            optimizer.state.clear()
            optimizer._numel_cache = None


def _group(weight: nn.Parameter, optimizer: Optimizer) -> dict:
    return next(group for group in optimizer.param_groups if any(parameter is weight for parameter in group["params"]))
