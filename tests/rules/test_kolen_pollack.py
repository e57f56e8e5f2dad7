from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import fahooks
from fahooks.plugins import InputError
from fahooks.probes import degrees
from fahooks.rules import KolenPollack
from fahooks.surgery import feedback_rules


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, x.flatten(1)[:, :3].tanh()


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()


def pairs(model: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    """W and B of every layer."""
    layers: Any = dict(model.named_modules())
    return [(layers[name].weight.detach(), rule.get_buffer("matrix")) for name, rule in feedback_rules(model).items()]


def test_the_difference_shrinks_by_weight_decay_alone():
    model = net()
    fahooks.convert(model, "kp")
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    fahooks.attach(model, optimizer)
    before = [(w - b).clone() for w, b in pairs(model)]
    moved = [w.clone() for w, _ in pairs(model)]
    train(model, optimizer, 25)
    for (w, b), difference, start in zip(pairs(model), before, moved, strict=True):
        torch.testing.assert_close(w - b, difference * (1 - 0.1 * 0.02) ** 25, rtol=1e-10, atol=1e-12)
        assert (w - start).norm() > 1e-3 * start.norm(), "control: the weights move"
        assert b.grad is None, "only during a step has B a gradient"


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1, weight_decay=0.1),
        lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: Adam(p, lr=0.005, weight_decay=0.05),
        lambda p: AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
        lambda p: Adam(p, lr=0.005, weight_decay=0.05, fused=True),
        lambda p: Adagrad(p, lr=0.15, weight_decay=0.15),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "fused", "adagrad"],
)
def test_the_angle_falls_below_ten_degrees(make: Callable[[Any], Optimizer]):
    model = net()
    fahooks.convert(model, "kp")
    optimizer = make(model.parameters())
    fahooks.attach(model, optimizer)
    assert all(degrees(w, b) > 60 for w, b in pairs(model)), "control: they begin apart"
    train(model, optimizer, 600)
    assert all(degrees(w, b) < 10 for w, b in pairs(model))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
        lambda p: Adagrad(p, lr=0.1, foreach=True),
    ],
    ids=["plain", "nesterov", "adagrad"],
)
def test_the_weight_moves_as_beside_a_fixed_matrix(make: Callable[[Any], Optimizer]):
    """Also by optimizers that write to the gradients."""
    learning, fixed = net(), net()
    for model, rule in ((learning, "kp"), (fixed, "fa")):
        fahooks.convert(model, rule)
        optimizer = make(model.parameters())
        fahooks.attach(model, optimizer)
        train(model, optimizer, 1)
    torch.testing.assert_close([*learning.parameters()], [*fixed.parameters()], rtol=1e-12, atol=1e-12)
    assert all((b - old).norm() > 1e-4 for (_, b), (_, old) in zip(pairs(learning), pairs(fixed), strict=True)), "control"


def test_without_weight_decay_they_stay_apart():
    model = net()
    fahooks.convert(model, "kp")
    optimizer = SGD(model.parameters(), lr=0.05)
    fahooks.attach(model, optimizer)
    before = [(w - b).clone() for w, b in pairs(model)]
    train(model, optimizer, 20)
    torch.testing.assert_close([w - b for w, b in pairs(model)], before, rtol=1e-10, atol=1e-12)


def test_each_b_follows_the_learning_rate_of_its_weight():
    model = net()
    fahooks.convert(model, "kp")
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[3].parameters(), *model[5].parameters()]}]
    optimizer = SGD(groups, lr=0.1, weight_decay=0.1)
    fahooks.attach(model, optimizer)
    before = [b.clone() for _, b in pairs(model)]
    train(model, optimizer, 3)
    moved = [not torch.equal(b, old) for (_, b), old in zip(pairs(model), before, strict=True)]
    assert moved == [False, True, True]


def test_b_follows_the_schedule_of_the_learning_rate():
    model = net()
    fahooks.convert(model, "kp")
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    fahooks.attach(model, optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = [(w - b).clone() for w, b in pairs(model)]
    factor = 1.0
    for step in range(4):
        train(model, optimizer, 1)
        schedule.step()
        factor *= 1 - 0.1 * 0.5**step * 0.02
    torch.testing.assert_close([w - b for w, b in pairs(model)], [factor * old for old in before], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("late", [0, 3])
def test_momentum_that_the_weight_has_gathered_moves_b_as_well(late: int):
    model = net()
    fahooks.convert(model, "bp")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    train(model, optimizer, late)
    fahooks.convert(model, "kp")
    fahooks.attach(model, optimizer)
    before = [(w - b).clone() for w, b in pairs(model)]
    train(model, optimizer, 1)
    # The gradients are the same, and so is the momentum, save that of weight decay: W - B moves by decay alone.
    for (w, b), old in zip(pairs(model), before, strict=True):
        torch.testing.assert_close(w - b, (1 - 0.1 * 0.02) * old, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_scaler_b_moves_as_without_one_and_a_skipped_step_leaves_it(fused: bool):
    def trained(scaler: torch.amp.GradScaler | None) -> nn.Sequential:
        model = net()
        fahooks.convert(model, "kp")
        optimizer = Adam(model.parameters(), lr=0.01, weight_decay=0.05, fused=fused)
        fahooks.attach(model, optimizer)
        if scaler is None:
            train(model, optimizer, 3)
            return model
        x, y = data()
        for batch in (x, x, torch.full_like(x, torch.inf), x):
            optimizer.zero_grad()
            before = copy.deepcopy(model.state_dict())
            scaler.scale(((model(batch) - y) ** 2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(value, before[name]) for name, value in model.state_dict().items()]
            assert set(moved) == {bool(batch.isfinite().all())}
        return model

    plain, scaled = trained(None), trained(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["kp", "fa"])
def test_momentum_begins_after_the_first_step_that_a_scaler_does_not_skip(rule: str):
    """A fused SGD would begin it in the skipped one, for the weights alone, with what happens to be in memory."""

    def trained(skipped: int) -> dict[str, Tensor]:
        model = net()
        fahooks.convert(model, rule)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02, fused=True)
        fahooks.attach(model, optimizer, fahooks.ConstantNorm(time_constant=5))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        x, y = data()
        for batch in [torch.full_like(x, torch.inf)] * skipped + [x, x, x]:
            optimizer.zero_grad()
            scaler.scale(((model(batch) - y) ** 2).mean()).backward()
            scaler.step(optimizer)
            assert all(p.grad is not None for p in model.parameters()), "gradients stay with whom they are"
            assert bool(optimizer.state) == bool(batch.isfinite().all())
            scaler.update()
        return model.state_dict()

    torch.testing.assert_close(trained(skipped=2), trained(skipped=0), rtol=1e-6, atol=1e-7)


def test_a_resumed_training_ends_with_the_same_bits():
    def made() -> tuple[nn.Sequential, Optimizer, Any]:
        model = net()
        fahooks.convert(model, "kp")
        optimizer = Adam(model.parameters(), lr=0.01, weight_decay=0.05)
        return model, optimizer, fahooks.attach(model, optimizer)

    model, optimizer, handle = made()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    train(model, optimizer, 5)
    other, again, other_handle = made()
    for thing, state in zip((other, again, other_handle), saved, strict=True):
        thing.load_state_dict(state)
    train(other, again, 5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_removed_it_leaves_the_optimizer_as_it_was():
    model = net()
    fahooks.convert(model, "kp")
    optimizer = Adam(model.parameters(), lr=0.01, weight_decay=0.05)
    before = [list(group["params"]) for group in optimizer.param_groups]
    lists = [group["params"] for group in optimizer.param_groups]
    handle = fahooks.attach(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(before[0]) + 3
    train(model, optimizer, 2)
    handle.remove()
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, part)) for part in before]
    assert all(group["params"] is same for group, same in zip(optimizer.param_groups, lists, strict=True)), "LBFGS keeps the list"
    assert len(optimizer.state) == len(before[0])
    with pytest.warns(UserWarning, match="is trained, and its B does not learn"):
        train(model, optimizer, 3)


def test_training_without_attach_warns_once_a_layer():
    model = net()
    fahooks.convert(model, "kp")
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"call fahooks.attach\(model, optimizer\)") as warned:
        train(model, optimizer, 5)
    assert len(warned) == 2, "the first layer's input asks for no error, so that its B is never used"


def test_weights_that_were_loaded_are_not_taken_for_trained():
    model, other = net(), net()
    fahooks.convert(model, "kp")
    x = data()[0].requires_grad_()
    model(x).sum().backward()
    with torch.no_grad():
        other.load_state_dict({name: 2 * value for name, value in other.state_dict().items()})
    model.load_state_dict(other.state_dict())
    model(x).sum().backward()


def test_a_b_that_was_replaced_is_refused():
    model = net()
    fahooks.convert(model, "kp")
    optimizer = SGD(model.parameters(), lr=0.01)
    fahooks.attach(model, optimizer)
    rule = next(iter(feedback_rules(model).values()))
    assert isinstance(rule, KolenPollack)
    rule.matrix = rule.matrix.clone()
    with pytest.raises(InputError, match="was moved or replaced after fahooks.attach: attach again"):
        train(model, optimizer, 1)


def test_an_lbfgs_that_has_stepped_takes_no_matrix_in_and_gives_those_it_has_back():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    fahooks.convert(model, {"0": "wm", "2": "kp"})
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss.detach()

    handle = fahooks.attach(model, optimizer)
    first = optimizer.step(closure)
    handle.remove()
    fahooks.revert(model)
    last = optimizer.step(closure)
    assert last < first
    fahooks.convert(model, {"0": "wm", "2": "kp"})
    with pytest.raises(InputError, match="^kp: an LBFGS that has stepped can take in no B: attach to a new one$"):
        fahooks.attach(model, optimizer)
    fahooks.attach(model, torch.optim.LBFGS(model.parameters(), lr=0.1))  # nothing was attached by halves
