"""What a conversion must leave as it was, and what it must change, shown on one model in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fahooks
from fahooks.reference import oracle
from fahooks.surgery import feedback_rules
from fahooks.surgery.sites import UNCONVERTIBLE

Gradients = dict[str, Tensor]

RULES = ("fa", "usf_sn")


class Inexact(AssertionError):
    """Something that a conversion must leave is not as it was, or something that it must change is not right."""


class TooSmall(Exception):
    """On inputs of this size hardly any gradient reaches the model's first layer, whatever the rule: nothing is shown."""


def check(plain: nn.Module, inputs: Sequence[Any], rules: Sequence[str] = RULES) -> int:
    """Convert copies of `plain` by each rule, and compare them with it and with the oracle.

    The forward pass gives the same bits, in training and in evaluation. The audit is clean. The gradients are those of the
    oracle, and of the same parameters that backpropagation gives one. As a control, the gradient below the first layer is
    another than that of backpropagation.

    Arguments:
        plain: the model; what is random in its forward pass is drawn from torch's global generator.
        inputs: what it is called with; those of floating point are asked for their gradient.
        rules: registered names.

    Returns:
        How many weights were converted.

    Raises:
        Inexact: one of these does not hold.
        TooSmall: the gradients vanish on these inputs.
    """
    expected_eval = outputs(plain.eval(), inputs)
    plain.train()  # some keep something of an evaluation until then
    expected_train, true = learn(copy.deepcopy(plain), inputs)
    converted_weights = 0
    for rule in rules:
        converted = copy.deepcopy(plain)
        report = fahooks.convert(converted, rule)
        converted_weights = len(report.converted)
        require_same_bits(outputs(converted.eval(), inputs), expected_eval, f"{rule}, evaluation")
        refused = [name for name, why in report.skipped.items() if why in UNCONVERTIBLE.values()]
        findings = fahooks.audit(converted.train(), *inputs, ignore=refused)
        require(findings.clean, f"{rule}, audit: {'; '.join(line.strip() for line in str(findings).splitlines())}")
        surrogate = copy.deepcopy(plain)
        with oracle(surrogate, feedback_rules(converted)):
            _, expected = learn(surrogate, inputs)
        del surrogate
        found_train, found = learn(converted, inputs)
        require_same_bits(found_train, expected_train, f"{rule}, training")
        missing = sorted(found.keys() ^ true.keys())
        require(not missing, f"{rule}: with a gradient before or after conversion only: {', '.join(missing)}")
        require_same_gradients(found, expected, rule)
        if distance(found, true) <= 1e-2:
            raise TooSmall(f"{rule}: the first gradients are within {distance(found, true):.1g} of backpropagation's")
    return converted_weights


def require(holds: bool, otherwise: str) -> None:
    """Raise `Inexact` with what is wrong unless it holds."""
    if not holds:
        raise Inexact(otherwise)


def outputs(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Every tensor that the model returns."""
    torch.manual_seed(3)
    return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def learn(model: nn.Module, inputs: Sequence[Any]) -> tuple[list[Tensor], Gradients]:
    """Outputs in training mode, and the gradients of all parameters and of the inputs under a loss that weighs each output."""
    torch.manual_seed(2)
    given = pytree.tree_map_only(Tensor, lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, list(inputs))
    model.train()
    found = [leaf for leaf in pytree.tree_leaves(model(*given)) if isinstance(leaf, Tensor)]
    carrying = [output for output in found if output.requires_grad]
    weights = (torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o) for o in carrying)
    torch.stack([(output * weight).sum() for output, weight in zip(carrying, weights, strict=True)]).sum().backward()
    leaves = {f"input {index}": x for index, x in enumerate(pytree.tree_leaves(given)) if isinstance(x, Tensor)}
    leaves |= dict(model.named_parameters())
    return found, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def require_same_bits(found: list[Tensor], expected: list[Tensor], where: str) -> None:
    """Outputs are equal to the last bit, and numbers."""
    require(len(found) == len(expected) > 0, f"{where}: {len(found)} outputs, {len(expected)} before")
    require(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{where}: outputs differ")
    require(all(bool(a.isfinite().all()) for a in found), f"{where}: outputs are no numbers")


def require_same_gradients(found: Gradients, expected: Gradients, rule: str) -> None:
    """Tolerances are of the size of float64's rounding, relative to the largest gradient where one is nothing but rounding."""
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    require(0 < scale < 1e100, f"{rule}: the largest gradient is {scale}")
    for name, gradient in expected.items():
        require(name in found, f"{rule}: no gradient for {name}")
        far = (found[name] - gradient).abs() - 1e-6 * gradient.abs()
        worst = far.max().item()
        close = worst <= 1e-10 * scale
        require(close, f"{rule}: the gradient of {name} is {worst:.2g} off, where the largest is {scale:.2g}")


def distance(found: Gradients, expected: Gradients) -> float:
    """Of the gradients that come lowest, those of the inputs or else of the first parameter, relative to their size."""
    lowest = next((name for name in expected if name.startswith("input ")), next(iter(expected)))
    return ((found[lowest] - expected[lowest]).norm() / expected[lowest].norm()).item()
