"""Forward passes of a whole model, for the direct rules: what the model returned, and which layers it called on the way.

A direct rule gets its error through the autograd graph itself. Where the error is known, at the model's output for example,
`inject` adds an edge from there to the input of a layer. So every backward pass, of any loss, sends the error of its own forward
pass, and nothing is kept between them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from fahooks.plugins import InputError, check_type
from fahooks.rules.base import DirectRule, Layout, check_model
from fahooks.rules.direct_matrix import Units


@dataclass(frozen=True)
class Visit:
    """A tensor of a pass that an error is to be sent to: the input of a layer, or the output of a block.

    Attributes:
        rule: of the layer or block.
        tensor: the tensor.
        units: how its units lie.
        version: how often it had been overwritten then.
        copy: what went on in its place, where that is another tensor.
    """

    rule: WholeModelRule
    tensor: Tensor
    units: Units
    version: int
    copy: Tensor | None = None

    def target(self) -> Tensor:
        """The tensor, as it was when it was noted.

        Raises:
            InputError: it was overwritten since.
        """
        if _version(self.tensor) != self.version:
            raise InputError(f"{self.rule.label}: the tensor at {self.rule.name!r} was overwritten before the pass ended")
        return self.tensor


IGNORED = -100
"""The class index of an example that does not count, as of `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Targets:
    """What `fahooks.targets` was given."""

    labels: Tensor
    scale: float | Tensor


@dataclass
class Pass:
    """One forward pass of the model.

    Attributes:
        samples: N, the size of the batch: the first dimension of the first tensor that the model is called with, and of what its
            layers read, whose parts then belong to the samples in order.
        targets: what `fahooks.targets` gave, if anything.
        visits: what errors are to be sent to, in the order of the calls.
    """

    samples: int
    targets: Targets | None = None
    visits: list[Visit] = field(default_factory=list)


class WholeModelRule(DirectRule):
    """A direct rule that has to do with the whole model, not with one layer alone.

    Attributes:
        passes: the forward passes of the model that was converted; set at conversion.
        output: the tensor of the model's output that the user chose to take the error from; None where nobody chose.
    """

    passes: Passes
    output: int | str | None = None

    def finish(self, visit: Visit, output: Any, current: Pass) -> Any:
        """The model's output, as it is to be returned; called at the end of the pass for each visit of this rule."""
        return output

    def visit(self, tensor: Tensor, layout: Layout, *, unbatched: bool = False, copy: Tensor | None = None) -> Visit | None:
        """Note in the pass that is running that `tensor` wants an error; None where activation checkpointing repeats a call.

        Raises:
            InputError: no pass of the model is running.
        """
        current = self.passes.current
        if current is None:
            if _recomputing():
                return None
            raise InputError(
                f"{self.label}: layer {self.name!r} was called outside of the forward pass of the model that was converted, from "
                "whose output its error comes: call that model, or convert the module that you call; activation checkpointing "
                "needs use_reentrant=False"
            )
        samples = 1 if unbatched or tensor.dim() == 1 else current.samples
        if layout == "sequence first" and tensor.dim() == 3 and tensor.shape[1] != samples:
            raise InputError(
                f"{self.label}: {self.name!r} is called for a batch of {tensor.shape[1]}, the model for one of {samples}: the "
                "batch must be the first dimension of what the model is called with (batch_first=True)"
            )
        try:
            lie = units(tensor, layout, samples, unbatched=unbatched)
        except InputError as error:
            what = f"{self.label}: at {self.name!r}, {error}"
            raise InputError(
                f"{what}: leave the layer to backpropagation (exclude=), or give the input a batch dimension"
            ) from error
        visit = Visit(self, tensor, lie, _version(tensor), copy)
        current.visits.append(visit)
        return visit


def units(tensor: Tensor, layout: Layout, samples: int, *, unbatched: bool = False) -> Units:
    """How the units of a tensor lie."""
    shape = torch.Size((1, *tensor.shape)) if unbatched or tensor.dim() == 1 else tensor.shape
    return Units(shape, layout, samples, turned=layout == "channels first" and _is_channels_last(tensor))


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor's channels, its second dimension, lie next to each other in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dimensions = tensor.dim()
    return dimensions in formats and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=formats[dimensions])


class Passes:
    """Watches the forward passes of `model`.

    Arguments:
        model: the model that was converted.

    Attributes:
        current: the pass that is running; None outside of one.
        targets: what the next passes are to know of.
        kept: the passes that ended inside `kept_passes`; None outside of it.
        chosen: the tensors of the model's output that rules take their error from by choice, each with the name of a rule.
        reached: those tensors of the output that an error has reached, until one of them is a chosen one.
        warned: whether it was said that none of them is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.current: Pass | None = None
        self.targets: Targets | None = None
        self.kept: list[Pass] | None = None
        self.chosen: dict[int | str, str] = {}
        self.reached: set[int | str] = set()
        self.warned = False
        self.handles = (
            model.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.end, always_call=True),
        )

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a pass; warn, once, where errors reached the model's output, and no tensor of it that a rule listens to."""
        if self.reached and self.chosen and self.reached.isdisjoint(self.chosen) and not self.warned:
            option, rule = next(iter(self.chosen.items()))
            used = ", ".join(map(repr, self.reached))
            self.warned = True
            warnings.warn(
                f"{rule}: its layers learn nothing so far: the loss does not use output={option!r} of the model, but {used}; "
                "choose another output=, or compute the loss from that one",
                stacklevel=2,
            )
        tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0)
        first = next(tensors, None)
        self.current = Pass(1 if first is None else first.shape[0], self.targets)

    def end(self, model: nn.Module, args: Any, output: Any) -> Any:
        """End the pass, and give the output the edges that the rules want."""
        current, self.current = self.current, None
        if current is None or output is None:  # there is no output where the forward pass raised
            return output
        if self.kept is not None:
            self.kept.append(current)
        for visit in reversed(current.visits):
            output = visit.rule.finish(visit, output, current)
        if self.reached.isdisjoint(self.chosen) and not torch.compiler.is_compiling():
            # A pass without gradients has no visits, and leaves what is watched as it is.
            if chosen := {_key(output, v.rule.output): v.rule.label for v in current.visits if v.rule.output is not None}:
                self.chosen = chosen
                self._watch(output)
        return output

    def _watch(self, output: Any) -> None:
        """Note which tensors of the output an error reaches."""
        for key, part in _parts(output).items():
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(lambda _, key=key: self.reached.add(key))

    def remove(self) -> None:
        """Watch no more."""
        for handle in self.handles:
            handle.remove()


def passes_of(model: nn.Module) -> list[Passes]:
    """The watched passes of a model and its parts."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), Passes)]


@contextmanager
def kept_passes(model: nn.Module) -> Iterator[list[Pass]]:
    """Collect the forward passes of the model and its parts that end inside, in order."""
    kept: list[Pass] = []
    watched = passes_of(model)
    for passes in watched:
        passes.kept = kept
    try:
        yield kept
    finally:
        for passes in watched:
            passes.kept = None


@contextmanager
def targets(model: nn.Module, labels: Tensor, *, scale: float | Tensor = 1.0) -> Iterator[None]:
    """Tell the rules of `model` that need them (drtp) the targets of the forward passes inside; others do not mind.

    Arguments:
        model: a converted model, or any other.
        labels: class indices int64 [N], or values of the shape of the model's output. An example of index IGNORED, which torch's
            cross-entropy leaves out, has no target: nothing is sent for it.
        scale: what the mean loss is multiplied by, as by a GradScaler or for gradient accumulation; a number, or a tensor [].

    Raises:
        InputError: the labels are no tensor, or the scale is no number.
    """
    check_model(model)
    if not isinstance(labels, Tensor):
        raise InputError(f"targets must be a tensor of class indices or values, got a {type(labels).__name__}")
    if not isinstance(scale, Tensor):
        check_type("scale", scale, Real, "a number or a tensor")
    watched = passes_of(model)
    before = [passes.targets for passes in watched]
    for passes in watched:
        passes.targets = Targets(labels, scale)
    try:
        yield
    finally:
        for passes, old in zip(watched, before, strict=True):
            passes.targets = old


def inject(
    carrier: Tensor, target: Tensor, send: Callable[[Tensor], Tensor], rule: DirectRule, *, only_way: bool = False
) -> Tensor:
    """`carrier`, with an edge: of the error that reaches it, `target` gets what `send` makes of it.

    Arguments:
        carrier: where the error comes from.
        target: where it goes to, a tensor that asks for a gradient.
        send: maps the error, of the carrier's shape, to a signal of the target's.
        rule: whose edge it is.
        only_way: whether an error that reaches `carrier` by another way than what is returned is refused, in the backward pass.
    """
    passed: list[int] | None = None
    if only_way and carrier.requires_grad and not torch.compiler.is_compiling():
        passed = []
        carrier.register_hook(partial(_refuse_other_ways, passed, rule.label))
    return Injection.apply(carrier, target, send, rule, passed)


def _refuse_other_ways(passed: list[int], rule: str, error: Tensor) -> None:
    """Raise where the backward pass that is running is not the one that an edge noted in `passed`."""
    if passed != [_backward_pass()]:
        raise InputError(
            f"{rule}: an error reached the model's output from inside the model: compute the loss from what the model returns, "
            "not inside it, or choose another output="
        )


MARK = "fahooks: a signal"


def mark(output: Tensor) -> Tensor:
    """`output` of a layer that read a copy of its input: where the graph is kept for inspection, it says that it is a signal.

    Without the edge to its input it would look like a constant, made of the layer's weight alone.
    """
    if _inspected() and output.grad_fn is not None:
        _metadata(output.grad_fn)[MARK] = True
    return output


def is_marked(node: Node) -> bool:
    """Whether a node of the graph made an output that was marked."""
    return MARK in _metadata(node)


def _inspected() -> bool:
    """Whether the graph is kept for inspection, as the audit does; a compiler can not trace the question."""
    return not torch.compiler.is_compiling() and torch.is_anomaly_enabled()


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; a compiler can not trace that, and leaves nothing to be overwritten."""
    return 0 if torch.compiler.is_compiling() else tensor._version


def _metadata(node: Any) -> dict[str, Any]:
    return node.metadata


def copy_without_edge(tensor: Tensor) -> Tensor:
    """A copy, in the same memory, that lets no error pass; where the graph is kept for inspection, one that is seen there."""
    copy = tensor.detach()
    return copy.requires_grad_().clone() if _inspected() else copy


class Injection(torch.autograd.Function):
    """The carrier itself, with the edge of `inject`."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, target: Tensor, send: Callable[[Tensor], Tensor], rule: DirectRule, passed: list[int] | None
    ) -> Tensor:
        """The carrier."""
        ctx.send, ctx.rule, ctx.shape, ctx.dtype, ctx.passed = send, rule, target.shape, target.dtype, passed
        return carrier.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        """The error for the carrier, and what was made of it for the target."""
        if ctx.passed is not None:
            ctx.passed[:] = [_backward_pass()]
        signal = ctx.send(error).reshape(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return error, signal, None, None, None


def chosen(output: Any, option: int | str | None, rule: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor of a model's output that the error is taken from, and what puts another in its place.

    Raises:
        InputError: it is not clear which, or there is none of that name.
    """
    parts = _parts(output)
    if option is None:
        found = [key for key, part in parts.items() if isinstance(part, Tensor) and part.is_floating_point()]
        if len(found) != 1:
            raise InputError(
                f"{rule}: the model returns several tensors, or none ({_available(parts)}): choose one with the option output="
            )
        option = found[0]
    option = _key(output, option)
    if not isinstance(parts.get(option), Tensor):
        raise InputError(f"{rule}: the model's output has no tensor output={option!r}; there are {_available(parts)}")
    return parts[option], lambda tensor: _with_part(output, option, tensor)


def _key(output: Any, option: Any) -> Any:
    """The key in `_parts` of what the user calls `option`: a field of a named tuple by its place."""
    return output._fields.index(option) if option in getattr(output, "_fields", ()) else option


def _parts(output: Any) -> Mapping[Any, Any]:
    if isinstance(output, Tensor):
        return {0: output}
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if isinstance(output, Mapping):
        return output
    return vars(output) if hasattr(output, "__dict__") else {}


def _available(parts: Mapping[Any, Any]) -> str:
    """What the option output= may be."""
    return ", ".join(repr(key) for key, part in parts.items() if isinstance(part, Tensor) and part.is_floating_point()) or "none"


def _with_part(output: Any, key: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple | list):
        values = [tensor if index == key else part for index, part in enumerate(output)]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if dataclasses.is_dataclass(output) and not isinstance(output, type | Mapping):
        return dataclasses.replace(output, **{key: tensor})
    changed = copy.copy(output)
    if isinstance(changed, Mapping):
        changed: Any = changed
        changed[key] = tensor
    else:
        setattr(changed, key, tensor)
    return changed


def _recomputing() -> bool:
    """Whether this is the second run of a part of a forward pass, by non-reentrant checkpointing, in the backward pass."""
    internals: Any = torch._C
    return _backward_pass() != -1 and internals._autograd._top_saved_tensors_default_hooks(True) is not None


def _backward_pass() -> int:
    """The number of the backward pass that is running; -1 outside of one."""
    internals: Any = torch._C
    return internals._current_graph_task_id()
