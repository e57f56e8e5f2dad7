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
    owners: dict[int, Callable[[Tensor], Tensor]] = {}
    # What is no view of a weight but made of one, and the same made of B: indexed, or mixed by a signal to a kernel.
    indexed: dict[int, tuple[Tensor, Tensor]] = {}
    mixed: dict[int, tuple[Tensor, Tensor]] = {}
    running: list[tuple[nn.Module, Callable[[Tensor], Tensor] | None]] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, _: running.append((module, rules.get(name)))

    def leave(*_: Any) -> None:
        running.pop()

    def feedback_of(weight: Tensor) -> Tensor | None:
        layer, rule = running[-1] if running else (None, None)
        if layer is not None and rule is not None and _is_made_of_the_weight(weight, layer):
            matrix = rule(weight.detach())
            return matrix if matrix.shape == weight.shape else None
        if id(weight) in owners:
            return owners[id(weight)](weight.detach())
        found = _same_of_b(weight, indexed)
        if found is not None:
            return found
        base = weight._base
        if base is not None and id(base) in owners:
            return owners[id(base)](base.detach()).as_strided(weight.size(), weight.stride(), weight.storage_offset())
        return None

    def replaced(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                feedback = feedback_of(weight)
                if feedback is None and operation is not linear:
                    feedback = _same_of_b(weight, mixed)
            if feedback is None:
                return operation(input, weight, bias, *args, **kwargs)
            return straight_through(operation, input, weight, bias, feedback, *args, **kwargs)

        return call

    def multiplied(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            multiply = partial(operation, **kwargs)
            with torch.no_grad():
                found = [(at, feedback_of(arg)) for at, arg in enumerate(args) if isinstance(arg, Tensor)]
            weights = [(at, feedback) for at, feedback in found if feedback is not None]
            if len(weights) != 1:
                return multiply(*args)
            ((place, feedback),) = weights
            output = straight_through_product(multiply, args, place, feedback)
            with torch.no_grad():
                mixed[id(output)] = output, multiply(*args[:place], feedback, *args[place + 1 :])
            return output

        return call

    def take(tensor: Tensor, index: Any) -> Tensor:
        taken = getitem(tensor, index)
        with torch.no_grad():
            feedback = None if taken._base is not None else feedback_of(tensor)
            if feedback is not None:
                indexed[id(taken)] = taken, getitem(feedback, index)
        return taken

    linear, getitem = F.linear, Tensor.__getitem__
    with ExitStack() as stack:
        for name, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                rule = rules.get(f"{name}.{parameter_name}" if name else parameter_name)
                if rule is None and parameter_name == "weight":
                    rule = rules.get(name)
                if rule is not None:
                    owners[id(parameter)] = rule
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        for operation in OPERATIONS:
            stack.enter_context(patch.object(F, operation, replaced(getattr(F, operation))))
        for owner, operation in PRODUCTS:
            stack.enter_context(patch.object(owner, operation, multiplied(getattr(owner, operation))))
        stack.enter_context(patch.object(Tensor, "__getitem__", take))
        yield


def _same_of_b(tensor: Tensor, noted: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor | None:
    """What is noted for a tensor, or the same view of what is noted for its base."""
    if id(tensor) in noted:
        return noted[id(tensor)][1]
    if tensor._base is not None and id(tensor._base) in noted:
        return noted[id(tensor._base)][1].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    return None


def _is_made_of_the_weight(weight: Tensor, layer: nn.Module) -> bool:
    """Whether a call's weight is the layer's parameter, or no parameter at all but made of one."""
    own = parametrize.is_parametrized(layer, "weight") or weight is layer._parameters.get("weight")
    return own or not isinstance(weight, nn.Parameter)
