from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fahooks import reference
from fahooks.reference import oracle, straight_through

Learn = Callable[..., Any]


def twice(weight: Tensor) -> Tensor:
    return 2 * weight


class Doubled(nn.Linear):
    """A linear layer whose call uses twice its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Adapted(nn.Linear):
    """A linear layer with a child of its own shape beside it."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.child = nn.Linear(size, size)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.child(input)


class Doubling(nn.Linear):
    """A linear layer that adds a call with another parameter of its own, of the same shape."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, bias=False)
        self.other = nn.Parameter(self.weight.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(input, self.other)


def test_value_and_gradients_of_the_surrogate_by_hand() -> None:
    x, w, b, feedback, delta = (torch.randn(*shape).double() for shape in ((3, 4), (2, 4), (2,), (2, 4), (3, 2)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    output = straight_through(F.linear, x, w, b, feedback)
    torch.testing.assert_close(output, x @ w.T + b)
    gradients = torch.autograd.grad(output, leaves, delta)
    torch.testing.assert_close(gradients, (delta @ feedback, delta.T @ x, delta.sum(0)))
    assert not torch.allclose(gradients[0], delta @ w), "control: the feedback is the weight"


def test_convolutions_send_the_error_through_the_feedback() -> None:
    x, w, feedback = (torch.randn(*shape).double() for shape in ((2, 4, 5, 5), (6, 2, 3, 3), (6, 2, 3, 3)))
    x.requires_grad_()
    output = straight_through(F.conv2d, x, w, None, feedback, stride=2, groups=2)
    (gradient,) = torch.autograd.grad(output, x, delta := torch.randn_like(output))
    expected = F.conv_transpose2d(delta, feedback, stride=2, groups=2)
    torch.testing.assert_close(gradient, expected)
    assert not torch.allclose(gradient, F.conv_transpose2d(delta, w.detach(), stride=2, groups=2))


@pytest.mark.parametrize(
    ("model", "rules", "factor"),
    [
        (nn.Linear(3, 3), {"": twice}, 2),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"0": twice, "1": twice}, 4),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"1": twice}, 2),
        (nn.Sequential(Doubled(3, 3)), {"0": twice}, 2),
        (nn.Sequential(Doubled(3, 3)), {}, 1),
        (nn.Sequential(*[nn.Linear(3, 3)] * 2), {"0": twice}, 4),
        (Doubling(3), {"": twice}, 1.5),
        (Doubling(3), {"other": twice}, 1.5),
    ],
    ids=[
        "the model",
        "two layers",
        "one of two",
        "made of the weight",
        "no rule",
        "a layer called twice",
        "its weight of two",
        "the other of two",
    ],
)
def test_rules_are_applied_to_the_calls_of_their_layer(
    learn: Learn, model: nn.Module, rules: dict[str, Callable[[Tensor], Tensor]], factor: float
) -> None:
    model = model.double()
    x = torch.randn(2, 3).double()
    plain, surrogate = learn(model, x), learn(model, x, around=lambda: oracle(model, rules))
    torch.testing.assert_close(surrogate.outputs, plain.outputs)
    torch.testing.assert_close(surrogate.gradients["input 0"], factor * plain.gradients["input 0"])


@pytest.mark.parametrize(("rules", "own", "child"), [({"": twice}, 2, 1), ({"child": twice}, 1, 2), ({}, 1, 1)])
def test_a_child_of_a_layer_keeps_its_own_rule(
    learn: Learn, rules: dict[str, Callable[[Tensor], Tensor]], own: float, child: float
) -> None:
    model = Adapted(3).double()
    x = torch.randn(2, 3).double()
    surrogate = learn(model, x, around=lambda: oracle(model, rules))
    true = learn(model, x).gradients
    delta = true["bias"].new_zeros(2, 3)
    torch.manual_seed(0)
    delta.copy_(torch.randn(2, 3, dtype=torch.float64))
    expected = delta @ (own * model.weight + child * model.child.weight)
    torch.testing.assert_close(surrogate.gradients["input 0"], expected.detach())


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 6)], ids=str)
def test_a_view_of_a_weight_gets_the_same_view_of_its_feedback(part: slice) -> None:
    packed = nn.ParameterDict({"weight": nn.Parameter(torch.randn(6, 3))})
    feedback = torch.randn(6, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with oracle(packed, {"weight": lambda weight: feedback}):
        output = F.linear(x, packed["weight"][part])
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, feedback[part].sum(0).expand(2, 3))
    assert not torch.allclose(gradient, packed["weight"][part].sum(0).expand(2, 3))


@pytest.mark.parametrize("fail", [False, True])
def test_torch_is_as_before_afterwards(fail: bool) -> None:
    before = [getattr(F, operation) for operation in reference.OPERATIONS]
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError) if fail else oracle(model, {}):
        with oracle(model, {"": twice}):
            assert all(getattr(F, operation) is not b for operation, b in zip(reference.OPERATIONS, before, strict=True))
            model(torch.randn(1, 2))
            if fail:
                raise KeyError
    assert [getattr(F, operation) for operation in reference.OPERATIONS] == before
    assert not model._forward_hooks and not model._forward_pre_hooks
