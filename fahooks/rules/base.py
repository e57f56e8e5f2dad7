"""What a feedback rule is, and how one gets a name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fahooks import plugins
from fahooks.functional import is_dynamo_compiling
from fahooks.rules.sharding import is_sharded

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

    name: str = ""
    """The name of its weight in the report; set at conversion."""

    origin: tuple[Any, ...] = ()
    """What it was made from: the class, the options, the seed and the weight's name; set at conversion."""

    note: str = ""
    """What its user should know, a line under the report of a conversion."""

    learns: bool = False
    """Whether it takes part in optimizer steps, which `fahooks.attach` tells it of."""

    grows: bool = False
    """Whether its state takes more memory later, once it has seen sizes that the weight does not tell."""

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

    reaches_out: bool = False
    """Whether it refers to more than its own state, which may be the model. Autograd's node of a convolution, in whose keep
    Python's garbage collector does not see it, is then not given it."""

    @property
    def memory_bytes(self) -> int:
        """What its state takes now."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def __call__(self, weight: Tensor) -> Tensor:
        """B, as `forward` gives it. What else a call of a module looks for takes longer than many a rule."""
        return super().__call__(weight) if self._forward_hooks or self._forward_pre_hooks else self.forward(weight)

    def attach(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Prepare to learn beside `weight`, which `optimizer` updates; called by `fahooks.attach` where `learns` is set."""

    def before_step(self, weight: nn.Parameter) -> None:
        """Act before the optimizer updates `weight`, whose gradient is final."""

    def after_step(self, weight: nn.Parameter) -> None:
        """Act after the optimizer has updated `weight`."""

    def detach(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Undo `attach`."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        # A plain checkpoint knows nothing of rules: it loads strictly, and the rule keeps the state that it has.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)


plugins.rules.base = Rule


class LearningRule(Rule):
    """A rule whose B learns at optimizer steps; leftmost among the bases of a rule that says what B is otherwise.

    `fahooks.attach(model, optimizer)` makes it learn. Where the weight is being trained without, it warns, once.
    """

    note = "B learns at optimizer steps, once fahooks.attach(model, optimizer) was called"
    learns = True
    attached = False
    seen: int | None = None
    learned: tuple[nn.Parameter, ...] = ()

    def forward(self, weight: Tensor) -> Tensor:
        """B, as the other base says."""
        # A compiler can not trace how often a tensor was written to.
        if not self.attached and not torch.compiler.is_compiling() and self.seen != weight._version:
            if self.seen is not None and self.seen >= 0:
                what = f"{self.label}: {self.name or 'the weight'} is trained, and its B does not learn"
                warnings.warn(f"{what}: call fahooks.attach(model, optimizer) before training", stacklevel=2)
            self.seen = weight._version if self.seen is None else -1
        if self.learned and not torch.compiler.is_compiling():
            self._check_learned(weight)
        return super().forward(weight)

    def _check_learned(self, weight: Tensor) -> None:
        """Refuse a layer that computes its weight from the parameter that B learns beside; autocast may change the dtype."""
        (parameter,) = self.learned
        # Of a sharded parameter a layer is given the whole one, which is another tensor, but none that was computed.
        other = weight.grad_fn is not None if is_sharded(parameter) else weight.data_ptr() != parameter.data_ptr()
        if weight.dtype == parameter.dtype and other:
            raise plugins.InputError(
                f"{self.label}: {self.name!r} computes its weight from its parameter (weight standardisation), and B would "
                "learn beside another weight than it serves: give this layer another rule"
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.seen = None  # weights that were loaded were not trained here

    def __getstate__(self) -> dict[str, Any]:
        # A copy is attached to no optimizer.
        return {**self.__dict__, "attached": False, "learned": ()}

    def attach(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Begin to learn."""
        self.attached = True
        self.learned = (weight,)  # in a tuple, since a module would take it for a parameter of its own

    def detach(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Learn no more."""
        self.attached = False
        self.learned = ()


Layout = Literal["channels first", "channels last", "sequence first"]


@dataclass(frozen=True)
class Call:
    """One linear map or convolution of a forward pass, that a direct rule is asked for.

    Attributes:
        plain: applies it to an input, as torch does.
        routed: applies it to an input, with the rule's B in its backward pass.
        layout: how its input lies: [N, C, ...] for convolutions, [N, ..., C] for linear maps, and [T, N, C] or [T N, C] for those
            inside `nn.MultiheadAttention`.
        unbatched: whether the input of a convolution has no dimension N.
    """

    plain: Callable[[Tensor], Tensor]
    routed: Callable[[Tensor], Tensor]
    layout: Layout
    unbatched: bool = False


class DirectRule(Rule):
    """A rule that sends something else below than B^T delta, and so decides itself what a call does.

    A subclass implements `around`; one that has to do with the whole model is a `fahooks.rules.passes.WholeModelRule`.
    """

    reaches_out = True

    def around(self, call: Call, input: Tensor) -> Tensor:
        """Do one call of the layer.

        Arguments:
            call: the linear map or convolution.
            input: x, which asks for a gradient.

        Returns:
            What `call.plain` gives, to the last bit; what differs is the error that reaches `input`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement around(call, input)")

    def forward(self, weight: Tensor) -> Tensor:
        """B = W, for what passes through the layer itself."""
        return weight


class FunctionRule(Rule):
    """B = function(W), for a plain function of the weight.

    Arguments:
        function: maps a weight to a feedback matrix of its shape.
    """

    reaches_out = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        """B = function(W)."""
        return self.function(weight)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def weight_norm(weight: Tensor) -> Tensor:
    """The L2 norm of a weight, in float32 or its own dtype where that is finer.

    Added up in one go, the squares of millions of weights lose the last digits of the norm: those of weight[0], weight[1] ...
    come first. Inductor adds up in blocks, and in the same pass takes the signs.
    """
    dtype = torch.float32 if weight.element_size() < 4 else None
    norm = torch.linalg.vector_norm
    if is_dynamo_compiling():
        return norm(weight, dtype=dtype)
    return norm(norm(weight, dim=_WITHIN_ROWS[weight.dim()], dtype=dtype))


_WITHIN_ROWS = tuple(tuple(range(1, dimensions)) for dimensions in range(65))  # 64 are the most that torch reduces


def check_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        InputError: names what was given.
    """
    plugins.check_type("the model", model, nn.Module, "a torch.nn.Module")


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
    if isinstance(value, bool) or not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise plugins.InputError(f"{option} must be a positive number, got {value!r}")
