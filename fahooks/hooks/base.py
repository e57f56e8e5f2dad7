"""What a hook on the optimizer is, and how one gets a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fahooks import plugins
from fahooks.surgery.sites import Site

register_hook = plugins.hooks.register

Match: TypeAlias = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence[Any] | None


def list_hooks() -> list[str]:
    """The names of all registered hooks, those of plugins included."""
    return plugins.hooks.names()


class Hook(nn.Module):
    """Changes gradients in place before each optimizer step, or weights after it.

    A subclass implements `before_step`, `after_step` or both, and `initialise` if it has state of its own:

        @fahooks.register_hook("ceiling", paper="...")
        class Ceiling(fahooks.Hook):
            '''abs(W) <= ceiling after each step.'''

            def __init__(self, *, ceiling: float = 1.0, match=None):
                super().__init__(match=match)
                self.ceiling = ceiling

            def after_step(self, weights):
                for weight in weights.values():
                    weight.clamp_(-self.ceiling, self.ceiling)

    Arguments of `__init__` are the hook's options. Every method runs without recording gradients. One hook object serves one
    optimizer at a time.

    Arguments:
        match: the layers whose weights it acts on, converted or not: a glob over qualified names ("layer1.*") or a module type,
            which also select everything inside such a module, a compiled regex, a function (name, module) -> bool, or a list of
            these; "*" is every layer that could be converted. None stands for the converted layers, and in a model that has none
            for "*".
    """

    steps: int = 0
    """Optimizer steps taken since `attach`, skipped ones not counted; within `after_step` the present one is."""

    def __init__(self, *, match: Match = None) -> None:
        super().__init__()
        self.match = match

    def initialise(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        sites: Mapping[str, Site],
        total_steps: int | None,
        generator_for: Callable[[str], torch.Generator],
    ) -> None:
        """Make the hook's state, once, when it is attached.

        Arguments:
            weights: those that the hook acts on, by layer name. A weight that several layers share stands under the first name.
            sites: where each weight is in the model, by the same names.
            total_steps: optimizer steps of the whole training; None where `attach` was not told.
            generator_for: a fresh private CPU generator for a weight, keyed by seed, hook and layer name. Draw from no other.
        """

    def begins(self, total_steps: int) -> int:
        """The first optimizer step, counted from 1, that it has a part in; one that is to begin after the last is refused.

        Arguments:
            total_steps: of the whole training.
        """
        return 1

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Change `weight.grad` in place: that of a weight which took no part is None.

        The gradients are those of the loss: a GradScaler's factor is taken out before. An optimizer that calls a closure
        several times a step (LBFGS) comes here after every call.

        Arguments:
            weights: those that the hook acts on, by layer name.
        """

    def after_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Change the weights in place. Not called for a step that a GradScaler skipped.

        Arguments:
            weights: those that the hook acts on, by layer name.
        """

    def remember(self, name: str, value: Tensor) -> None:
        """Keep a tensor for the weight called `name`; it is saved and restored with checkpoints."""
        self.register_buffer(_key(name), value)

    def recall(self, name: str) -> Tensor:
        """The tensor that `remember` keeps for the weight called `name`."""
        return self.get_buffer(_key(name))

    def forget(self) -> None:
        """Let go of all that `remember` keeps."""
        for key in [key for key in self._buffers if key.startswith("/")]:
            del self._buffers[key]


plugins.hooks.base = Hook


def _key(name: str) -> str:
    # The leading slash keeps a layer called "match" from an attribute of that name, and gives a model of one layer a name.
    return "/" + name.replace(".", "/")
