from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.plugins import InputError


def targets(handle: Any) -> dict[str, Tensor]:
    (hook, weights) = handle.hooks[0]
    return {name: hook.recall(name).clone() for name in weights}


@pytest.mark.parametrize("strength", [0.001, 2.0])
def test_gradients_are_those_of_equation_9(strength: float, net: Callable[..., Any], learn: Callable[..., None]):
    model, plain = net("usf").double(), net("usf").double()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (model, plain))
    handle = fahooks.attach(model, optimizer, {"name": "alignment", "strength": strength})
    learn(model, optimizer, 1)
    learn(plain, other, 1)
    drawn = targets(handle)
    weights = [plain.get_submodule(name).weight for name in drawn]
    penalty = strength * torch.stack([(w - v).square().sum() for w, v in zip(weights, drawn.values(), strict=True)]).sum()
    assert len(weights) == 3
    for name, weight, added in zip(drawn, weights, torch.autograd.grad(penalty, weights), strict=True):
        gradient = model.get_submodule(name).weight.grad
        torch.testing.assert_close(gradient, weight.grad + added, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(gradient, weight.grad, rtol=1e-6, atol=1e-6), "control: the penalty is there"
    assert torch.equal(model.dense.bias.grad, plain.dense.bias.grad)


def test_weights_are_pulled_to_their_targets(net: Callable[..., Any], learn: Callable[..., None]):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = fahooks.attach(model, optimizer, fahooks.Alignment(strength=1.0))
    fixed = targets(handle)

    def distance() -> float:
        return (model.dense.weight - fixed["dense"]).norm().item()

    start = distance()
    learn(model, optimizer, 30)
    assert distance() < 0.2 * start
    assert all(torch.equal(v, fixed[name]) for name, v in targets(handle).items())


@pytest.mark.parametrize(
    ("layer", "variance"),
    [
        (lambda: nn.Linear(60, 90), 1 / 60),
        (lambda: nn.Conv2d(16, 32, 3, groups=2), 1 / (8 * 9)),
        (lambda: nn.ConvTranspose2d(32, 16, 3), 1 / (32 * 9)),
    ],
)
def test_targets_have_the_variance_of_section_5_1(layer: Callable[[], nn.Module], variance: float):
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drawn = targets(fahooks.attach(model, optimizer, "alignment"))[""]
    assert drawn.var().item() == pytest.approx(variance, rel=5 * (2 / drawn.numel()) ** 0.5)
    assert abs(drawn.mean().item()) < 5 * (variance / drawn.numel()) ** 0.5


def test_targets_are_keyed_by_seed_and_layer(net: Callable[..., Any]):
    def drawn(match: Any = None, seed: int = 0) -> dict[str, Tensor]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return targets(fahooks.attach(model, optimizer, fahooks.Alignment(match=match), seed=seed))

    everything, one, other = drawn(), drawn("dense"), drawn("dense", seed=1)
    assert list(one) == ["dense"]
    assert torch.equal(one["dense"], everything["dense"])
    assert not torch.equal(one["dense"], other["dense"])
    assert not torch.equal(everything["dense"].flatten()[:24], everything["output"].flatten()[:24])


def test_a_weight_that_took_no_part_is_left_alone(net: Callable[..., Any]):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fahooks.attach(model, optimizer, "alignment")
    before = model.dense.weight.detach().clone()
    optimizer.step()
    assert model.dense.weight.grad is None and torch.equal(model.dense.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "strength must be a positive number, got 0"),
        ({"init": "fan_on"}, "init must be one of 'fan_out', 'fan_in', 'glorot', got 'fan_on'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        fahooks.Alignment(**options)
