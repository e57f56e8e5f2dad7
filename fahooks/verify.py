"""Verification: what a converted model must do, tried on one input, against what the model did before it was converted.

    plain = verify.outputs(model, x)
    report = fahooks.convert(model, "usf_sn")
    print(verify.verify(model, plain, x, ignore=report.left_out))

Three things must hold. The forward pass gives the same bits. In every converted layer another feedback matrix B sends another
error below. And the audit is clean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from fahooks import functional
from fahooks.auditing import audit
from fahooks.observation import as_found, edges, inputs_first, tensors, with_gradient
from fahooks.plugins import one_line
from fahooks.rules import Rule, targets
from fahooks.rules.direct_matrix import DirectMatrix
from fahooks.surgery import FeedbackLayer, feedback_rules


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with what: a layer, an output or a parameter."""

    culprit: str
    reason: str


@dataclass(frozen=True)
class Check:
    """One of the things that must hold.

    Attributes:
        claim: what must hold.
        problems: what speaks against it.
        extent: the claim in full, if it holds: what it was tried on.
    """

    claim: str
    problems: tuple[Problem, ...]
    extent: str

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the claim."""
        return not self.problems


@dataclass(frozen=True)
class Verification:
    """The three checks of a converted model; prints as a line each, with the culprits below."""

    forward: Check
    rules: Check
    audit: Check

    @property
    def checks(self) -> tuple[Check, ...]:
        """All three."""
        return self.forward, self.rules, self.audit

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The verification in types that json can write."""
        return {"ok": self.ok} | {name: {"ok": check.ok} | asdict(check) for name, check in vars(self).items()}

    def __str__(self) -> str:
        width = max(len(check.claim) for check in self.checks)
        lines = []
        for check in self.checks:
            count = f"{len(check.problems)} {_plural('problem', len(check.problems))}"
            lines.append(f"{check.claim:{width}}  {f'ok      {check.extent}' if check.ok else f'FAILED  {count}'}")
            lines += [f"    {problem.culprit}: {problem.reason}" for problem in check.problems]
        return "\n".join(lines)


def outputs(model: nn.Module, *inputs: Any) -> dict[str, list[Tensor]]:
    """Every tensor that `model` returns "in evaluation mode" and "as built", which is the mode that it is in.

    Gradients are recorded, so that a converted model goes through its rules. The model and the random number generators are
    left as they were; dropout draws the same numbers at every call.
    """
    with _evaluating(model), _recording(model):
        evaluated = [tensor.detach().clone() for tensor in _run(model, inputs)]
    with _recording(model):
        return {"in evaluation mode": evaluated, "as built": [tensor.detach().clone() for tensor in _run(model, inputs)]}


@contextmanager
def senders(model: nn.Module) -> Iterator[set[str]]:
    """Note the converted layers that send an error below their input, or would, in the forward passes inside, by name.

    An input that needs no gradient takes none, as the images at the first layer of a network.
    """
    found: set[str] = set()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FeedbackLayer)}
    handles = [
        layer.register_forward_pre_hook(partial(_note_sender, found, name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note_sender(found: set[str], name: str, layer: FeedbackLayer, args: Any, kwargs: Any) -> None:
    # Attention has one projection below another: it sends an error within.
    within = layer.at_output or layer.functional_weights is not None
    if within or any(tensor.requires_grad for tensor in tensors((args, kwargs))):
        found.add(name)


def verify(model: nn.Module, plain: Mapping[str, Sequence[Tensor]], *inputs: Any, ignore: Sequence[str] = ()) -> Verification:
    """Check that a converted model computes what it did, and that it learns by its rules.

    Costs a few forward and two backward passes, however many layers there are. The model, its `.grad` and the random number
    generators are left as they were.

    Arguments:
        model: a converted model, in the mode in which it is to learn.
        plain: what `outputs` gave for it before it was converted, with the same weights and inputs.
        inputs: what the model is called with.
        ignore: names of layers that were left to backpropagation on purpose, as `fahooks.audit` takes them.
    """
    audited, idle = _check_audit(model, inputs, ignore)
    return Verification(_check_forward(model, plain, inputs), _check_rules(model, inputs, idle), audited)


def _check_forward(model: nn.Module, plain: Mapping[str, Sequence[Tensor]], inputs: Sequence[Any]) -> Check:
    claim, extent = "forward unchanged", f"same bits as the plain model, {' and '.join(plain)}"
    try:
        converted = outputs(model, *inputs)
    except Exception as error:
        return _broken(claim, error)
    problems = [problem for mode in plain for problem in _differences(plain[mode], converted[mode], mode)]
    return Check(claim, tuple(problems), extent)


def _differences(before: Sequence[Tensor], after: Sequence[Tensor], mode: str) -> Iterator[Problem]:
    if len(before) != len(after):
        yield Problem("model", f"{mode}: returns {len(after)} tensors, {len(before)} before it was converted")
        return
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        if was.shape != now.shape or was.dtype != now.dtype:
            yield Problem(f"output {index}", f"{mode}: was {tuple(was.shape)} {was.dtype}, is {tuple(now.shape)} {now.dtype}")
        elif not torch.equal(_bits(was), _bits(now)):
            yield Problem(f"output {index}", f"{mode}: differs by up to {_distance(was, now):.3g}")


def _distance(was: Tensor, now: Tensor) -> float:
    return (was.to(torch.complex128) - now.to(torch.complex128)).abs().max().item()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _check_audit(model: nn.Module, inputs: Sequence[Any], ignore: Sequence[str]) -> tuple[Check, frozenset[str]]:
    """The check, and the names of the layers that only ever see constants."""
    rules = feedback_rules(model)
    try:
        found = audit(model, *inputs, ignore=ignore)
    except Exception as error:
        return _broken("audit clean", error), frozenset()
    problems = [Problem(name or "model", "its rule is never called") for name in found.never_called]
    problems += [
        Problem(", ".join(use.parameters), f"unrouted {use.operation}{' at ' if use.source else ''}{use.source}")
        for use in found.unrouted
    ]
    problems += [Problem(name or "model", "its rule sends a sample the error of another one") for name in found.mixed]
    extent = "every linear map with a weight is routed through a rule"
    if ignore:
        extent += f", save {len(ignore)} {_plural('layer', len(ignore))} left out as asked"
    idle = frozenset(rules) - set(found.routed) - set(found.never_called)
    return Check("audit clean", tuple(problems), extent), idle


def _check_rules(model: nn.Module, inputs: Sequence[Any], idle: frozenset[str]) -> Check:
    rules = {name: rule for name, rule in feedback_rules(model).items() if name not in idle}
    try:
        effective = _effective(model, inputs, rules)
    except Exception as error:
        return _broken("rule in effect", error)
    reasons = {None: "the backward pass never asks for its B", False: "another B sends the same gradient below"}
    problems = [Problem(name or "model", reasons[effective.get(name)]) for name in rules if not effective.get(name)]
    extent = (
        f"a drawn matrix in place of the rule's changes the gradients below each of {len(rules)} converted "
        f"{_plural('layer', len(rules))}"
        if rules
        else "no layer has a rule"
    )
    if rules and not _sends_with(model, inputs):
        extent += "; where the inputs need no gradient, there is nothing below, and all layers learn as by backpropagation"
    if idle:
        extent += f"; {len(idle)} more {_plural('layer', len(idle))} with a constant input, below which there is no gradient"
    return Check("rule in effect", tuple(problems), extent)


def _sends_with(model: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether any layer sends an error below where the inputs themselves need no gradient."""
    with _recording(model), senders(model) as found:
        _run(model, inputs, prepared=lambda value: value)
    return bool(found)


def _effective(model: nn.Module, inputs: Sequence[Any], rules: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Whether another B changes the gradient sent below, at every call that asks for B; by name, of the rules that are asked.

    Two backward passes through one graph, the second with a drawn matrix in place of every B. In both, each call gets the same
    drawn error from above: what it sends below then depends on its own B alone, and tells of it also where the true error is
    zero, as in a branch that batch normalisation starts by scaling to zero.
    """
    with _recording(model):
        results = [tensor for tensor in _run(model, inputs) if tensor.requires_grad]
        if not results:
            return {}
        graph = list(inputs_first([tensor.grad_fn for tensor in results if tensor.grad_fn is not None], edges))
        asked, below = _backward(results, graph, rules, another=False)
        _, below_another = _backward(results, graph, rules, another=True)
    effective: dict[str, bool] = {}
    for node, names in asked.items():
        for name in names:
            effective[name] = effective.get(name, True) and _changed(below[node], below_another[node])
    return effective


def _backward(
    results: Sequence[Tensor], graph: Sequence[Node], rules: Mapping[str, nn.Module], *, another: bool
) -> tuple[dict[Node, set[str]], dict[Node, tuple[Tensor | None, ...]]]:
    """Which rules every node of the graph asks for B, and the gradient that it then sends below."""
    asked: dict[Node, set[str]] = defaultdict(set)
    below: dict[Node, tuple[Tensor | None, ...]] = {}
    running: list[Node] = []

    def enter(node: Node, place: int) -> Callable[..., Any]:
        def draw_error(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            running.append(node)
            torch.manual_seed(place)
            return tuple(None if gradient is None else torch.randn_like(gradient) for gradient in gradients)

        return draw_error

    def leave(gradients_below: tuple[Tensor | None, ...], _: Any) -> None:
        node = running.pop()
        if node in asked:
            below[node] = gradients_below

    def ask(name: str) -> Callable[..., Tensor | None]:
        def note(rule: nn.Module, weight: Any, matrix: Tensor) -> Tensor | None:
            if running:
                asked[running[-1]].add(name)
            return torch.randn_like(matrix) if another else None

        return note

    leaves = [variable for node in graph if isinstance(variable := getattr(node, "variable", None), Tensor)]
    with ExitStack() as stack:
        for place, node in enumerate(graph):
            if isinstance(node, BackwardCFunction) or node.name() == functional.RECORDED:
                stack.callback(node.register_prehook(enter(node, place)).remove)
                stack.callback(node.register_hook(leave).remove)
        for name, rule in rules.items():
            for module in rule.modules():
                if isinstance(module, Rule | DirectMatrix):
                    stack.callback(module.register_forward_hook(ask(name)).remove)
        total = torch.stack([result.abs().sum().double() for result in results]).sum()
        torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return asked, below


def _changed(before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> bool:
    """Whether a gradient changed by more than rounding."""
    norm = torch.linalg.vector_norm
    pairs = [(was, now) for was, now in zip(before, after, strict=True) if was is not None and now is not None]
    return any(bool(norm(now - was) > 1e-3 * norm(was)) for was, now in pairs)


def _run(model: nn.Module, inputs: Sequence[Any], prepared: Callable[[Any], Any] = with_gradient) -> list[Tensor]:
    torch.manual_seed(0)
    samples = next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim() > 0), 1)
    with targets(model, torch.zeros(samples, dtype=torch.int64)):
        return list(tensors(model(*map(prepared, inputs))))


@contextmanager
def _recording(model: nn.Module) -> Iterator[None]:
    """Record gradients for every parameter, and leave the model and the random number generators as found."""
    with as_found(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _broken(claim: str, error: Exception) -> Check:
    return Check(claim, (Problem("model", one_line(error)),), "the converted model does not run")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
