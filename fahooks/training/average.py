"""The exponential moving average of a model's weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """A plain model whose weights follow those of another, converted one.

    After step t it becomes d times itself plus 1 - d times the other's weights, d = min(decay, (1 + t) / (10 + t)), so that the
    initial weights are soon forgotten. Floating-point buffers, such as running statistics, are averaged likewise, and counts are
    copied. Classes that average whole models pair all tensors in order; here they go by name, since rules keep tensors of their
    own in the model, some of which they make only in the first backward pass.

    Arguments:
        model: the plain model, with the weights that the other starts from.
        trained: the other.
        decay: the largest d.

    Attributes:
        steps: how many it has followed.
    """

    def __init__(self, model: nn.Module, trained: nn.Module, decay: float) -> None:
        self.model = model.requires_grad_(False)
        self.decay = decay
        self.steps = 0
        own, theirs = model.state_dict(), trained.state_dict()
        averaged = [name for name, value in own.items() if value.is_floating_point()]
        self._averaged = [own[name] for name in averaged], [theirs[name] for name in averaged]
        self._copied = [(own[name], theirs[name]) for name in own.keys() - averaged]

    def update(self) -> None:
        """Follow one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(*self._averaged, self.steps)
        for own, other in self._copied:
            own.copy_(other)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of steps."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
