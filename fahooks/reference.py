"""The readable oracle that every fast path is tested against: no custom backward, no class swapped, no mode.

A straight-through surrogate whose value is op(x, W, b), and whose gradient with respect to x is that of op(x, B):

    y = op(stopgrad(x), W, b) + op(x, B) - stopgrad(op(x, B))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

PRODUCTS = (
    (torch, "matmul"),
    (torch, "mm"),
    (torch, "bmm"),
    (torch, "addmm"),
    (torch, "baddbmm"),
    (torch, "einsum"),
    (F, "bilinear"),
    (Tensor, "matmul"),
    (Tensor, "__matmul__"),
)

OPERATIONS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def straight_through(
    operation: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """One linear map or convolution by the surrogate.

    Arguments:
        operation: `torch.nn.functional.linear`, `conv2d`, `conv_transpose1d` ...
        input: x.
        weight: W.
        bias: b or None.
        feedback: B, of W's shape.
        args: the operation's further arguments.
        kwargs: the operation's further keyword arguments.

    Returns:
        op(x, W, b), with the gradient of op(x, B) with respect to x.
    """
    surrogate = operation(input, feedback.detach(), None, *args, **kwargs)
    return operation(input.detach(), weight, bias, *args, **kwargs) + (surrogate - surrogate.detach())


def straight_through_product(operation: Callable[..., Tensor], args: Sequence[Any], place: int, feedback: Tensor) -> Tensor:
    """One product, linear in W, by the surrogate.

    Arguments:
        operation: `torch.matmul`, `torch.einsum` ...
        args: its arguments; what is no tensor is passed on.
        place: the index of W among them.
        feedback: B, of W's shape.

    Returns:
        operation(*args), with the gradient for all arguments but W of the operation with B in the place of W.
    """
    constants = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    surrogate = operation(*args[:place], feedback.detach(), *args[place + 1 :])
    return operation(*constants[:place], args[place], *constants[place + 1 :]) + (surrogate - surrogate.detach())


@contextmanager
def oracle(model: nn.Module, rules: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Make the forward passes of a plain model inside the block use the surrogate.

    The functions of `torch.nn.functional`, and torch's products, are replaced while the block runs. A call belongs to the
    innermost module whose forward is running, where it uses that module's weight or what is made of it; else to the module
    that owns its weight.

    Arguments:
        model: a model that was not converted.
        rules: W -> B by the name that the weight has in the report of `fahooks.convert`.
    """
    surrogate = _Surrogate(model, rules)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(surrogate.enter(module, rules.get(name))).remove)
            stack.callback(module.register_forward_hook(surrogate.leave, always_call=True).remove)
        for name in OPERATIONS:
            operation = getattr(F, name)
            stack.enter_context(patch.object(F, name, surrogate.convolved(operation, kernel=name != "linear")))
        for owner, name in PRODUCTS:
            stack.enter_context(patch.object(owner, name, surrogate.multiplied(getattr(owner, name))))
        stack.enter_context(patch.object(Tensor, "__getitem__", surrogate.indexing(Tensor.__getitem__)))
        yield


class _Surrogate:
    """What takes the place of torch's functions, and what it knows of weights.

    Attributes:
        owners: the rule of every parameter, by its id.
        indexed: by id, what was taken of a weight and is no view of it, and the same of B.
        mixed: by id, what a signal made of a weight, which may be the kernel of a convolution, and the same of B.
        running: the modules whose forward is running, each with its rule.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self.owners: dict[int, Callable[[Tensor], Tensor]] = {}
        self.indexed: dict[int, tuple[Tensor, Tensor]] = {}
        self.mixed: dict[int, tuple[Tensor, Tensor]] = {}
        self.running: list[tuple[nn.Module, Callable[[Tensor], Tensor] | None]] = []
        for name, parameter in model.named_parameters(remove_duplicate=False):
            rule = rules.get(name) or (rules.get(name.removesuffix("weight").rstrip(".")) if name.endswith("weight") else None)
            if rule is not None:
                self.owners[id(parameter)] = rule

    def enter(self, module: nn.Module, rule: Callable[[Tensor], Tensor] | None) -> Callable[..., None]:
        """A hook: the forward of `module` begins."""
        return lambda *_: self.running.append((module, rule))

    def leave(self, *_: Any) -> None:
        """A hook: the forward of the innermost module ends."""
        self.running.pop()

    @torch.no_grad()
    def feedback_of(self, weight: Tensor) -> Tensor | None:
        """B for what a call multiplies by, or the same part of B where it is a part of a weight; None where it is none."""
        layer, rule = self.running[-1] if self.running else (None, None)
        if layer is not None and rule is not None and _is_made_of_the_weight(weight, layer):
            matrix = rule(weight.detach())
            return matrix if matrix.shape == weight.shape else None
        if id(weight) in self.owners:
            return self.owners[id(weight)](weight.detach())
        base = weight._base
        if base is not None and id(base) in self.owners:
            return _same_view(self.owners[id(base)](base.detach()), weight)
        return _noted(weight, self.indexed)

    def convolved(self, operation: Callable[..., Tensor], *, kernel: bool) -> Callable[..., Tensor]:
        """What stands in for a linear map or a convolution, which may have a mixed `kernel`."""

        def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            feedback = self.feedback_of(weight)
            if feedback is None and kernel:
                feedback = _noted(weight, self.mixed)
            if feedback is None:
                return operation(input, weight, bias, *args, **kwargs)
            return straight_through(operation, input, weight, bias, feedback, *args, **kwargs)

        return call

    def multiplied(self, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What stands in for a product."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            multiply = partial(operation, **kwargs)
            found = [(at, self.feedback_of(arg)) for at, arg in enumerate(args) if isinstance(arg, Tensor)]
            weights = [(at, feedback) for at, feedback in found if feedback is not None]
            if len(weights) != 1:
                return multiply(*args)
            ((place, feedback),) = weights
            output = straight_through_product(multiply, args, place, feedback)
            with torch.no_grad():
                self.mixed[id(output)] = output, multiply(*args[:place], feedback, *args[place + 1 :])
            return output

        return call

    def indexing(self, getitem: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
        """What stands in for indexing."""

        def call(tensor: Tensor, index: Any) -> Tensor:
            taken = getitem(tensor, index)
            feedback = None if taken._base is not None else self.feedback_of(tensor)
            if feedback is not None:
                self.indexed[id(taken)] = taken, getitem(feedback, index).detach()
            return taken

        return call


def _noted(tensor: Tensor, notes: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor | None:
    """What is noted for a tensor, or the same view of what is noted for its base."""
    if id(tensor) in notes:
        return notes[id(tensor)][1]
    if tensor._base is not None and id(tensor._base) in notes:
        return _same_view(notes[id(tensor._base)][1], tensor)
    return None


def _same_view(base: Tensor, view: Tensor) -> Tensor:
    return base.as_strided(view.size(), view.stride(), view.storage_offset())


def _is_made_of_the_weight(weight: Tensor, layer: nn.Module) -> bool:
    """Whether a call's weight is the layer's parameter, or no parameter at all but made of one."""
    own = parametrize.is_parametrized(layer, "weight") or weight is layer._parameters.get("weight")
    return own or not isinstance(weight, nn.Parameter)
