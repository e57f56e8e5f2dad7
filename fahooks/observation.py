"""Looking at a forward pass without leaving a trace: the model put back as it was found, and the autograd graph walked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Put requires_grad, buffers and random number generators back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    extra = [(m, m.get_extra_state()) for m in model.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, state in extra:
                module.set_extra_state(state)
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    # Written only where it changed: a backward pass that is still to come may have saved the buffer.
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def with_gradient(value: Any) -> Any:
    """A copy of a floating-point tensor that carries a gradient and, being no leaf, can be overwritten; else the value."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().requires_grad_().clone()
    return value


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples, mappings and dataclasses, at any depth."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            for field in fields(leaf):
                yield from tensors(getattr(leaf, field.name))


def edges(node: Node, which: slice = slice(None)) -> list[Node]:
    """The nodes that `node` sends its error to, of the inputs that `which` selects."""
    return [edge for edge, _ in node.next_functions[which] if edge is not None]


def inputs_first(outputs: Sequence[Node], below: Callable[[Node], Sequence[Node]]) -> Iterator[Node]:
    """Every node that `below` leads to from the outputs, each after those below it; no recursion: graphs are deep."""
    entered: set[Node] = set()
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, finished = stack.pop()
        if finished:
            yield node
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((edge, False) for edge in reversed(below(node)))
