"""What a feedback rule is, and how one gets a name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fahooks import plugins

register_rule = plugins.rules.register


def list_rules() -> list[str]:
    """The names of all registered feedback rules, those of plugins included."""
    return plugins.rules.names()


class Rule(nn.Module):
    """Maps the weight W of one layer to its feedback matrix B.

    A subclass implements `forward(weight)`, and `initialise` if it has state of its own, which it keeps in buffers:

        @fahooks.register_rule("half", paper="...")
        class Half(fahooks.Rule):
            '''B = W / 2.'''

            def forward(self, weight):
                return weight / 2

    Arguments of `__init__` are the rule's options. One rule object serves one weight of one layer, as `layer.feedback`.
    """

    weight_shape: torch.Size
    """The shape of the weight that the rule was made for; set at conversion."""

    label: str = ""
    """What the user chose it by; set at conversion."""

    origin: tuple[Any, ...] = ()
    """What it was made from: the class, the options, the seed and the weight's name; set at conversion."""

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Draw the rule's state, once, at conversion.

        Arguments:
            weight: the layer's effective weight; state takes its shape, dtype, device and memory format.
            fan_in: N_in, the connections into a unit in the forward direction.
            fan_out: N_out, the connections into a unit in the backward direction.
            generator: a private CPU generator, keyed by seed and layer name. Draw from no other.
        """

    def forward(self, weight: Tensor) -> Tensor:
        """The feedback matrix B for the effective weight of one call; called without gradient, in the backward pass.

        Arguments:
            weight: W, as the forward call used it (standardised, pruned, cast by autocast ...).

        Returns:
            B, of W's shape, dtype and device.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(weight)")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        # A plain checkpoint knows nothing of rules: it loads strictly, and the rule keeps the state that it has.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)


class FunctionRule(Rule):
    """B = function(W), for a plain function of the weight.

    Arguments:
        function: maps a weight to a feedback matrix of its shape.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        """B = function(W)."""
        return self.function(weight)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def draw(
    weight: Tensor,
    *,
    init: str,
    distribution: str,
    gain: float,
    fan_in: int,
    fan_out: int,
    generator: torch.Generator,
) -> Tensor:
    """A random matrix of `weight`'s shape, dtype, device and memory format, with mean 0 and a variance set by the fans.

    Drawn in float32 on the CPU, so that one seed gives one matrix on every device and in every dtype.

    Arguments:
        weight: gives shape, dtype, device and memory format; its values are not read.
        init: variance gain^2 x 1/N_out for "fan_out" (section 5.1 of Moskovitz et al. 2018), 1/N_in for "fan_in",
            2 / (N_in + N_out) for "glorot".
        distribution: "normal" or "uniform".
        gain: factor on the standard deviation.
        fan_in: N_in.
        fan_out: N_out.
        generator: a CPU generator.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """
    check_draw(init, distribution, gain)
    variances = {"fan_out": 1 / fan_out, "fan_in": 1 / fan_in, "glorot": 2 / (fan_in + fan_out)}
    deviation = gain * variances[init] ** 0.5
    matrix = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    if distribution == "normal":
        matrix.normal_(0, deviation, generator=generator)
    else:
        bound = 3**0.5 * deviation
        matrix.uniform_(-bound, bound, generator=generator)
    return torch.empty_like(weight, requires_grad=False).copy_(matrix)


def check_draw(init: str, distribution: str, gain: float) -> None:
    """Refuse options that `draw` does not take.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """
    check_choice("init", init, ("fan_out", "fan_in", "glorot"))
    check_choice("distribution", distribution, ("normal", "uniform"))
    check_positive("gain", gain)


def check_choice(option: str, value: object, choices: Any) -> None:
    """Refuse an option's value that is not among `choices`.

    Raises:
        InputError: names the option, the value and the choices.
    """
    if value not in choices:
        hint = plugins.near(str(value), choices)
        raise plugins.InputError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_positive(option: str, value: object) -> None:
    """Refuse an option's value that is not a positive, finite number.

    Raises:
        InputError: names the option and the value.
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise plugins.InputError(f"{option} must be a positive number, got {value!r}")
