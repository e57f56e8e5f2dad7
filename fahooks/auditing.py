"""The audit: names every linear map of a forward pass that uses a weight and is not routed through a feedback rule.

It runs the model once with gradients recorded for its inputs and all its parameters, and reads the autograd graph, which
knows nothing of layers, classes and adapters. A call that went through `fahooks.functional` left a node there that names its
rule. A matrix product or convolution that did not, and one of whose operands is made of parameters alone, sends the error back
by the transpose of that operand. Products of two signals (attention) and elementwise products with parameters (norms, layer
scale) keep their true derivative under every rule.

Direct rules send each sample of a batch its own error. Which values belong to which sample they know from shapes alone, so that
the audit tries it: it changes samples of the example, and looks at what changes at the inputs of their layers.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fahooks import functional
from fahooks.observation import as_found, edges, inputs_first, tensors, with_gradient
from fahooks.plugins import InputError
from fahooks.rules.base import check_model
from fahooks.rules.passes import Injection, is_marked, kept_passes, passes_of
from fahooks.surgery import feedback_rules, lineage
from fahooks.surgery.layer import rule_of

LINEAR_OPERATIONS: dict[str, slice] = {
    "Linear": slice(0, 2),
    "Mm": slice(0, 2),
    "Bmm": slice(0, 2),
    "Mv": slice(0, 2),
    "Dot": slice(0, 2),
    "Vdot": slice(0, 2),
    "Addmm": slice(1, 3),
    "Addbmm": slice(1, 3),
    "Baddbmm": slice(1, 3),
    "Addmv": slice(1, 3),
    "Addr": slice(1, 3),
    "Trilinear": slice(0, 3),
    "Convolution": slice(0, 2),
    "ConvolutionOverrideable": slice(0, 2),
    "MpsConvolution": slice(0, 2),
    "MkldnnRnnLayer": slice(None),
    "CudnnRnn": slice(None),
    "MiopenRnn": slice(None),
}
"""Torch's linear operations, as autograd names them, and which edges of their nodes are operands (others are biases).
einsum, matmul, tensordot, bilinear and the recurrent layers that are not fused are made of these."""

_CORE = (functional._Linear, functional._Convolution, functional._Product)

LOOK_UPS = ("Embedding", "EmbeddingBag")
"""Operations that make a signal of a parameter."""


@dataclass(frozen=True)
class Unrouted:
    """A linear operation that sends the error back through a weight itself.

    Attributes:
        operation: as autograd calls it, e.g. "Addmm".
        parameters: qualified names of the parameters that the weight is made of; a tied parameter has several.
        source: the line of Python that called it, "file:line: code".
    """

    operation: str
    parameters: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Findings:
    """What an audit found; prints as a table.

    Attributes:
        routed: names of the converted weights whose rule serves a call, as in the report of `fahooks.convert`.
        never_called: names of the converted weights whose rule no call used.
        idle: names of the converted weights that only multiply a constant, such as a table of coordinates: no error is sent
            to it, so that there is nothing to route.
        unrouted: the linear operations with a weight and without a rule, in the order of the forward pass.
        mixed: names of the converted weights whose direct rule sends a sample the error of another one: the batch is not the
            first dimension of their input, the parts of a sample do not lie together in it, or it has nothing to do with the
            batch. Tried in evaluation mode, where the example has several samples that differ.
    """

    routed: tuple[str, ...]
    never_called: tuple[str, ...]
    idle: tuple[str, ...]
    unrouted: tuple[Unrouted, ...]
    mixed: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether every rule is used, every linear operation with a weight has one, and each sample gets its own error."""
        return not self.never_called and not self.unrouted and not self.mixed

    def __str__(self) -> str:
        rows = [("never called", name or "(model)", "") for name in self.never_called]
        rows += [("mixed samples", name or "(model)", "") for name in self.mixed]
        rows += [(f"unrouted {use.operation}", ", ".join(use.parameters), use.source) for use in self.unrouted]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = (
            f"{len(self.routed)} weights routed, {len(self.never_called)} never called, {len(self.unrouted)} unrouted operations"
        )
        counts += f", {len(self.mixed)} with mixed samples" if self.mixed else ""
        return "\n".join([*lines, f"{'clean' if self.clean else 'not clean'}: {counts}"])


def audit(model: nn.Module, *example_inputs: Any, ignore: str | Iterable[str] = (), **example_options: Any) -> Findings:
    """Run one forward pass and name every linear map in it that uses a weight and is not routed through a rule.

    Parameters, `.grad`, requires_grad, buffers, training flags and random number generators are left as they were. The pass
    runs in the mode that the model is in, and tells of the calls made in this mode on these inputs. Audit the model itself,
    not what torch.compile or reentrant checkpointing made of it: those hide its operations from autograd.

    Arguments:
        model: any module; of one that was not converted every linear map is unrouted.
        example_inputs: what the model is called with; it gets copies of floating-point tensors.
        ignore: names or globs, as `fahooks.convert` takes for `exclude`, of layers that are meant to have no rule, e.g.
            `report.left_out`; operations that use their parameters only are not listed.
        example_options: keyword arguments of that call.

    Returns:
        The findings; `.clean` where there are none.

    Raises:
        InputError: there is no example, or no output of the model carries a gradient, as under torch.no_grad.
    """
    check_model(model)
    if not example_inputs and not example_options:
        _check_needs_nothing(model)
    # In anomaly mode a node knows its source, and the core makes a function of each convolution, whose node knows its rule.
    with as_found(model), torch.enable_grad(), torch.autograd.set_detect_anomaly(True, check_nan=False):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        args, options = pytree.tree_map(with_gradient, (example_inputs, example_options))
        outputs = [tensor for tensor in tensors(model(*args, **options)) if tensor.grad_fn is not None]
    if not outputs:
        raise InputError(
            "nothing to audit: no output of the model carries a gradient; its forward pass must not run under torch.no_grad "
            "or torch.inference_mode, nor detach what it returns"
        )
    ignored = [ignore] if isinstance(ignore, str) else list(ignore)
    mixed = _mixed(model, (example_inputs, example_options)) if passes_of(model) else ()
    return _findings(_Graph(outputs, model), model, ignored, mixed)


def _check_needs_nothing(model: nn.Module) -> None:
    try:
        inspect.signature(model.forward).bind()
    except TypeError as error:
        raise InputError(f"audit needs what the model is called with, fahooks.audit(model, images): {error}") from error


def _mixed(model: nn.Module, example: Any) -> tuple[str, ...]:
    """The names of weights at whose inputs a change of one sample changes what a direct rule takes for another's."""
    with kept_passes(model) as passes:
        _evaluate(model, example)
        samples = min((current.samples for current in passes), default=1)
        batches = [value for value in pytree.tree_leaves(example) if _is_batch(value, samples)]
        if samples < 2 or all(torch.equal(batch, batch.roll(1, 0)) for batch in batches):
            return ()
        del passes[:]
        for number in range(3):
            _evaluate(model, pytree.tree_map(partial(_changed, samples, number), example))
    # Batch norm without running statistics makes something of every sample for all others, much less than of the sample itself.
    statistics = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())
    limit = 0.5 if statistics else 1e-3
    mixed: dict[str, None] = {}
    third = len(passes) // 3
    visits = [[visit for current in passes[at : at + third] for visit in current.visits] for at in (0, third, 2 * third)]
    for before, one, every in zip(*visits, strict=False):  # what a model calls may depend on what it is given
        if not before.units == one.units == every.units:
            continue
        folded = [visit.units.fold(visit.tensor.detach().double()) for visit in (before, one, every)]
        changes = (folded[1] - folded[0]).flatten(1).norm(dim=1)
        # The same for any batch, and not for every sample, as a class token is.
        constant = torch.equal(folded[0], folded[2]) and not torch.equal(folded[0], folded[0].roll(1, 0))
        if constant or changes[1:].norm() > limit * changes[0]:
            mixed[before.rule.name] = None
    return tuple(mixed)


def _evaluate(model: nn.Module, example: Any) -> None:
    """One forward pass in evaluation mode, in which the samples of a batch have nothing to do with each other."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with as_found(model), torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            args, options = pytree.tree_map(with_gradient, example)
            model.eval()(*args, **options)
    finally:
        for module, mode in modes:
            module.training = mode


def _changed(samples: int, number: int, value: Any) -> Any:
    """A batch whose neighbours take the place of no sample (number 0), of the first one (1), or of all samples (2)."""
    if number == 0 or not _is_batch(value, samples):
        return value
    rolled = value.detach().roll(1, 0)
    return rolled if number == 2 else torch.cat([rolled[:1], value.detach()[1:]])


def _is_batch(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples


def _findings(graph: _Graph, model: nn.Module, ignored: Sequence[str], mixed: tuple[str, ...]) -> Findings:
    served: set[int] = set()
    constant: set[str] = set()
    unrouted: list[Unrouted] = []
    for node in graph.error_path():
        weight = graph.weight(node)
        if _is_core(node):
            served.add(id(rule_of(node.feedback)))  # pyright: ignore[reportAttributeAccessIssue]
        elif _is(node, Injection):
            served.add(id(node.rule))  # pyright: ignore[reportAttributeAccessIssue]
        elif weight and len(graph.operands(node)) == 1:
            constant |= weight
        elif weight and not graph.all_within(weight, ignored):
            unrouted.append(Unrouted(_operation(node), tuple(sorted(weight)), _source(node)))
    rules = feedback_rules(model)
    unused = [name for name, rule in rules.items() if id(rule) not in served]
    idle = [name for name in unused if any(_within(parameter, [name]) for parameter in constant)]
    return Findings(
        routed=tuple(name for name in rules if name not in unused),
        never_called=tuple(name for name in unused if name not in idle),
        idle=tuple(idle),
        unrouted=tuple(unrouted),
        mixed=mixed,
    )


class _Graph:
    """The autograd graph of one forward pass, read from its outputs, which keep it: a node of a Python function does not.

    Attributes:
        made_of: for every node, the names of the parameters that its tensor is made of alone; None if it is a signal.
    """

    def __init__(self, outputs: Sequence[Tensor], model: nn.Module) -> None:
        self.outputs = outputs
        self.ends = [output.grad_fn for output in outputs if output.grad_fn is not None]
        self.names: dict[int, frozenset[str]] = {}
        self.matrices: set[str] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)] = self.names.get(id(parameter), frozenset()) | {name}
            if parameter.dim() > 1:
                self.matrices.add(name)
        self.made_of: dict[Node, frozenset[str] | None] = {}
        for node in inputs_first(self.ends, edges):
            self.made_of[node] = self._made_of(node)

    def _made_of(self, node: Node) -> frozenset[str] | None:
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self.names.get(id(variable))
        if _is_core(node) or _is(node, Injection) or _operation(node) in LOOK_UPS or is_marked(node):
            return None
        parts = [self.made_of[edge] for edge in edges(node)]
        return None if None in parts else frozenset().union(*(part for part in parts if part))

    def error_path(self) -> Iterator[Node]:
        """The nodes that the error passes, inputs first; those that only make a weight are not among them."""
        return inputs_first(self.ends, self._error_edges)

    def _error_edges(self, node: Node) -> list[Node]:
        if _is_core(node):
            # A kernel that a signal mixes of weights passes the error on to that signal.
            place = getattr(node, "place", 1)
            weights = [edge for edge in edges(node, slice(place, place + 1)) if self.made_of[edge]]
            return [edge for edge in edges(node) if edge not in weights]
        if _is(node, Injection):
            return edges(node)
        weights = [operand for operand in self.operands(node) if self.made_of[operand]]
        return [edge for edge in edges(node) if edge not in weights]

    def operands(self, node: Node) -> list[Node]:
        """The operands of a linear operation that carry a gradient, none for other operations."""
        # Python's autograd functions are opaque; the core's are known.
        opaque = isinstance(node, BackwardCFunction)
        return edges(node, slice(None) if opaque else LINEAR_OPERATIONS.get(_operation(node), slice(0)))

    def weight(self, node: Node) -> frozenset[str]:
        """The names of the parameters that the weight of a linear operation is made of; empty for other operations."""
        names = frozenset().union(*(self.made_of[operand] or () for operand in self.operands(node)))
        return names & self.matrices if isinstance(node, BackwardCFunction) else names

    def all_within(self, parameters: Iterable[str], patterns: Sequence[str]) -> bool:
        """Whether the patterns select every parameter, by one of its names."""
        return all(any(_within(name, patterns) for name in names) for names in self.names.values() if names & set(parameters))


def _operation(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _is_core(node: Node) -> bool:
    return _is(node, *_CORE)


def _is(node: Node, *functions: type) -> bool:
    return getattr(node, "_forward_cls", None) in functions


def _source(node: Any) -> str:
    """The innermost line outside torch and fahooks that recorded the node; autograd keeps it in anomaly mode."""
    inner = (Path(torch.__file__).parent, Path(__file__).parent)
    for frame in reversed(node.metadata.get("traceback_", [])):
        found = re.match(r'\s*File "(.+)", line (\d+), in .*\n\s*(.*)', frame)
        if found and not any(Path(found[1]).is_relative_to(folder) for folder in inner):
            return f"{'/'.join(Path(found[1]).parts[-3:])}:{found[2]}: {found[3]}"
    return ""


def _within(parameter: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns selects a parameter or a module around it; the empty name is the whole model."""
    return any(not pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in lineage(parameter))
