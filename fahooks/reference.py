"""The readable oracle that every fast path is tested against: no custom backward, no class swapped, no mode.

A straight-through surrogate whose value is op(x, W, b), and whose gradient with respect to x is that of op(x, B):

    y = op(stopgrad(x), W, b) + op(x, B) - stopgrad(op(x, B))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPERATIONS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def straight_through(
    operation: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, *args: Any, **kwargs: Any
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


@contextmanager
def oracle(model: nn.Module, rules: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Make the forward passes of a plain model inside the block use the surrogate.

    The functions of `torch.nn.functional` are replaced while the block runs; which layer a call belongs to is told by the
    innermost layer whose forward is running, or by the identity of the weight where a module uses it functionally.

    Arguments:
        model: a model that was not converted.
        rules: W -> B by the name that the weight has in the report of `fahooks.convert`.
    """
    owners: dict[int, Callable[[Tensor], Tensor]] = {}
    running: list[Callable[[Tensor], Tensor] | None] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(rules.get(name))

    def leave(*_: Any) -> None:
        running.pop()

    def feedback_of(weight: Tensor) -> Tensor | None:
        rule = owners.get(id(weight))
        if rule is not None:
            return rule(weight.detach())
        base = weight._base
        if base is not None and id(base) in owners:
            matrix = owners[id(base)](base.detach())
            return matrix.as_strided(weight.size(), weight.stride(), weight.storage_offset())
        rule = running[-1] if running else None
        return None if rule is None else rule(weight.detach())

    def replaced(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                feedback = feedback_of(weight)
            if feedback is None:
                return operation(input, weight, bias, *args, **kwargs)
            return straight_through(operation, input, weight, bias, feedback, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                rule = rules.get(f"{name}.{parameter_name}" if name else parameter_name)
                if rule is None and parameter_name == "weight":
                    rule = rules.get(name)
                if rule is not None:
                    owners[id(parameter)] = rule
            if name in rules:
                stack.callback(module.register_forward_pre_hook(enter(name)).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        for operation in OPERATIONS:
            stack.enter_context(patch.object(F, operation, replaced(getattr(F, operation))))
        yield
