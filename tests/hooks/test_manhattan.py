from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fahooks


def test_with_sgd_every_weight_moves_by_the_learning_rate(net: Callable[..., Any], learn: Callable[..., None]):
    model, plain = net(), net()
    lr = 2**-6
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=lr) for m in (model, plain))
    fahooks.attach(model, optimizer, "manhattan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, optimizer, 1)
    learn(plain, other, 1)
    moving = 0
    for name, p in model.named_parameters():
        gradient = plain.get_parameter(name).grad
        if "bias" in name:
            assert torch.equal(p, before[name] - lr * gradient), "control: biases move by their gradient"
        else:
            assert torch.equal(p, before[name] - lr * gradient.sign())
            assert not torch.allclose(p, plain.get_parameter(name))
            moving += int((gradient != 0).sum())
            assert (p - before[name])[gradient == 0].count_nonzero() == 0
    assert moving > 100


def test_a_weight_without_a_gradient_is_left_alone(net: Callable[..., Any], learn: Callable[..., None]):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fahooks.attach(model, optimizer, "manhattan")
    before = model.dense.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.dense.weight, before) and model.dense.weight.grad is None
