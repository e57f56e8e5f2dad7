from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fahooks
from fahooks.hooks.constant_norm import weight_norm
from fahooks.plugins import InputError


def norms(model: nn.Module) -> dict[str, float]:
    weights = {name: p for name, p in model.named_parameters() if "weight" in name}
    return {name: torch.linalg.vector_norm(weight.detach().double()).item() for name, weight in weights.items()}


def test_norms_stay_over_a_hundred_adam_steps(net: Callable[..., Any], learn: Callable[..., None]):
    model, plain = net(), net()
    start = norms(model)
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=1e-3) for m in (model, plain))
    fahooks.attach(model, optimizer, "constant_norm")
    before = model.conv.weight.detach().clone()
    learn(model, optimizer, 100)
    learn(plain, other, 100)
    for name, norm in norms(model).items():
        assert norm == pytest.approx(start[name], rel=1e-6)
        assert norms(plain)[name] != pytest.approx(start[name], rel=1e-2), "control: norms change without the hook"
    assert nn.functional.cosine_similarity(model.conv.weight.flatten(), before.flatten(), dim=0) < 0.99


def test_each_step_is_that_of_equation_10(net: Callable[..., Any], learn: Callable[..., None]):
    model, plain = net().double(), net().double()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    fahooks.attach(model, optimizer, "constant_norm")
    initial = norms(plain)
    for _ in range(3):
        learn(model, optimizer, 1)
        learn(plain, other, 1)
        with torch.no_grad():
            for name, weight in plain.named_parameters():
                if name in initial:
                    weight.copy_(initial[name] * weight / weight.norm())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time_constant", [0.5, 3, 100.0])
def test_the_norm_relaxes_with_the_time_constant(time_constant: float, net: Callable[..., Any], learn: Callable[..., None]):
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    initial = norms(model)
    fahooks.attach(model, optimizer, {"name": "constant_norm", "time_constant": time_constant})
    with torch.no_grad():
        model.dense.weight.mul_(3)
    for step in range(1, 5):
        learn(model, optimizer, 1)
        n_0 = initial["dense.weight"]
        expected = n_0 + (3 * n_0 - n_0) * math.exp(-step / time_constant)
        assert norms(model)["dense.weight"] == pytest.approx(expected, rel=1e-9)
        assert expected > n_0, "control: it is not there yet"
        assert norms(model)["conv.weight"] == pytest.approx(initial["conv.weight"], rel=1e-9)


def test_a_weight_without_a_norm(net: Callable[..., Any], learn: Callable[..., None]):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = fahooks.attach(model, optimizer, "constant_norm")
    nn.init.zeros_(model.dense.weight)
    learn(model, optimizer, 1)
    assert (model.dense.weight == 0).all()
    handle.remove()
    with pytest.raises(InputError, match="constant_norm: the weight of layer 'dense' has norm 0: initialise it, or leave it out"):
        fahooks.attach(model, optimizer, "constant_norm")


def test_the_norm_of_a_large_weight_is_accurate():
    weight = torch.randn(1024, 3136, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
    assert weight_norm(weight).item() == pytest.approx(exact, rel=1e-6)
    assert weight_norm(weight.bfloat16()).dtype == torch.float32
    assert weight_norm(weight[:2, :2].double()).dtype == torch.float64


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "5"])
def test_a_time_constant_is_positive(value: Any):
    with pytest.raises(InputError, match=f"time_constant must be a positive number, got {value!r}"):
        fahooks.ConstantNorm(time_constant=value)
