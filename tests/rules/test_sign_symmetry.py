from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import SignSymmetry, SignSymmetryInit, SignSymmetryNormalized
from fahooks.surgery import feedback_rules

N_OUT = 6 * 2 * 3


def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 12, (2, 3), groups=2).double()


def drawn() -> Tensor:
    """B_0, as `fa` draws it for the same layer."""
    layer = conv()
    fahooks.convert(layer, "fa")
    return feedback_rules(layer)[""].get_buffer("matrix")


def normalised(weight: Tensor) -> Tensor:
    """Eq. 5, number by number."""
    norm = sum(w**2 for w in weight.flatten().tolist()) ** 0.5
    ones = sum(w != 0 for w in weight.flatten().tolist()) ** 0.5
    return weight.sign() * norm / max(ones, 1)


# Rule, options, and the feedback matrix that it is to send for a weight.
RULES: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("usf", {}, lambda weight: weight.sign() / N_OUT**0.5),
    ("usf", {"scale": 1}, torch.sign),
    ("usf", {"scale": 0.25}, lambda weight: weight.sign() / 4),
    ("usf_init", {}, lambda weight: drawn().abs() * weight.sign()),
    ("usf_init", {"gain": 2.0}, lambda weight: 2 * drawn().abs() * weight.sign()),
    ("usf_sn", {}, normalised),
]

each_rule = pytest.mark.parametrize(("rule", "options", "feedback"), RULES, ids=[f"{name} {o or ''}" for name, o, _ in RULES])


def sent(layer: nn.Conv2d, delta: Tensor, input_size: tuple[int, ...]) -> Tensor:
    x = torch.randn(input_size).double().requires_grad_()
    return torch.autograd.grad(layer(x), x, delta)[0]


@each_rule
def test_feedback_follows_the_signs_of_the_live_weight(
    rule: str, options: dict[str, Any], feedback: Callable[[Tensor], Tensor]
) -> None:
    layer, size = conv(), (2, 4, 5, 5)
    fahooks.convert(layer, rule, **options)
    delta = torch.randn(2, 12, 4, 3).double()
    first = feedback(layer.weight.detach())
    torch.testing.assert_close(sent(layer, delta, size), conv2d_input(size, first, delta, groups=2))
    assert not torch.allclose(sent(layer, delta, size), conv2d_input(size, layer.weight, delta, groups=2)), "control: B is W"

    layer.weight.grad = layer.weight.detach() + torch.randn_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=1).step()
    second = feedback(layer.weight.detach())
    assert not torch.equal(first.sign(), second.sign())
    torch.testing.assert_close(sent(layer, delta, size), conv2d_input(size, second, delta, groups=2))


@each_rule
def test_a_zero_weight_sends_no_error(rule: str, options: dict[str, Any], feedback: Callable[[Tensor], Tensor]) -> None:
    layer = conv()
    fahooks.convert(layer, rule, **options)
    served = feedback_rules(layer)[""]
    weight = layer.weight.detach().clone()
    weight[0] = 0
    matrix = served(weight)
    assert not matrix[0].any() and matrix[1:].all()
    torch.testing.assert_close(matrix, feedback(weight))
    assert not served(torch.zeros_like(weight)).any()


def test_strict_normalization_keeps_the_norm_of_the_weight() -> None:
    weight = torch.randn(7, 5)
    torch.testing.assert_close(SignSymmetryNormalized()(weight).norm(), weight.norm())
    assert not torch.isclose(SignSymmetry()(weight).norm(), weight.norm())


def test_strict_normalization_does_not_overflow_in_half_precision() -> None:
    weight = torch.full((300, 300), 300.0, dtype=torch.float16)
    assert torch.equal(SignSymmetryNormalized()(weight), weight)
    assert weight.norm().isinf(), "control: the norm fits"


@pytest.mark.parametrize("scale", [0, -1, float("inf"), "1"])
def test_a_scale_that_is_not_positive_is_refused(scale: Any) -> None:
    with pytest.raises(InputError, match=f"scale must be a positive number, got {scale!r}"):
        fahooks.convert(nn.Linear(2, 2), "usf", scale=scale)


@pytest.mark.parametrize("rule", ["usf", "usf_sn"])
def test_sign_rules_hold_no_state(rule: str) -> None:
    layer = conv()
    keys = list(layer.state_dict())
    assert fahooks.convert(layer, rule).memory_bytes == 0
    assert list(layer.state_dict()) == keys


def test_initialised_magnitudes_are_state() -> None:
    layer = conv()
    assert fahooks.convert(layer, "usf_init").memory_bytes == layer.weight.numel() * 8
    assert torch.equal(layer.state_dict()["feedback.magnitude"], drawn().abs())


def test_rules_print_their_options() -> None:
    layer = nn.Linear(2, 16)
    fahooks.convert(layer, "usf")
    assert "SignSymmetry(scale=0.25)" in repr(layer)
    assert repr(SignSymmetryInit(init="glorot")) == "SignSymmetryInit(init='glorot', distribution='normal', gain=1.0)"
    assert repr(SignSymmetryNormalized()) == "SignSymmetryNormalized()"
