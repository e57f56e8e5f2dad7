from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD as SGD_of_torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fahooks.recipe import SGD, Adam, AdamW, Constant, Cosine, Step
from fahooks.training.optimizers import make_optimizer, make_schedule


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            Adam(name="adam", lr=0.1, weight_decay=0.3, betas=(0.8, 0.9)),
            lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3, betas=(0.8, 0.9)),
        ),
        (AdamW(name="adamw", lr=0.1, weight_decay=0.3), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3)),
        (
            SGD(name="sgd", lr=0.1, weight_decay=0.3, momentum=0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, momentum=0.9, nesterov=True),
        ),
    ],
)
def test_an_optimizer_takes_the_steps_that_its_options_say(config, reference):
    ours, theirs = model(), model()
    start = ours.weight.detach().clone()
    steps = make_optimizer(ours, config), reference(theirs.parameters())
    x = torch.randn(4, 3)
    for _ in range(3):
        for net, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert not torch.allclose(ours.weight, start)


def test_frozen_parameters_are_left_out():
    net = model()
    net.bias.requires_grad_(False)
    optimizer = make_optimizer(net, Adam(name="adam", lr=0.1))
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(net.weight)]


def test_a_first_step_that_a_scaler_skips_moves_the_schedule_on_without_a_warning():
    net = model()
    optimizer = SGD_of_torch(net.parameters(), lr=1.0)  # as for sharded parameters; a fused one is called, and skips by itself
    schedule = make_schedule(optimizer, Cosine(name="cosine"), epochs=2, steps=1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.full((1, 3), torch.inf)).sum()).backward()
    before = net.weight.detach().clone()
    scaler.step(optimizer)
    schedule.step()
    assert torch.equal(net.weight, before)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    plain = LambdaLR(SGD_of_torch(net.parameters(), lr=1.0), lambda step: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        plain.step()  # control


def rates(config: Constant | Step | Cosine, *, epochs: int, steps: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = make_optimizer(model(), SGD(name="sgd", lr=1.0))
    schedule = make_schedule(optimizer, config, epochs=epochs, steps=steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Constant(), [1.0] * 5),
        (Step(name="step", every=2, gamma=0.1), [1.0, 1.0, 0.1, 0.1, 0.01]),
        (Cosine(name="cosine"), [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),
    ],
)
def test_a_schedule_sets_the_learning_rate_of_each_epoch(config, expected: list[float]):
    assert rates(config, epochs=5, steps=2) == pytest.approx([rate for rate in expected for _ in range(2)])


def test_warmup_rises_at_every_step_to_what_the_schedule_says():
    assert rates(Constant(warmup=1.5), epochs=3, steps=4) == pytest.approx([(i + 1) / 6 for i in range(6)] + [1.0] * 6)
    assert rates(Step(name="step", every=1, gamma=0.5, warmup=2), epochs=3, steps=2) == pytest.approx(
        [1 / 4, 2 / 4, 0.5 * 3 / 4, 0.5, 0.25, 0.25]
    )


def test_the_papers_mnist_schedule_drops_after_epoch_20():
    assert rates(Step(name="step", every=20, gamma=0.1), epochs=25, steps=1) == pytest.approx([1.0] * 20 + [0.1] * 5)


def after_a_skipped_step(make: Callable[[nn.Module], Optimizer]) -> nn.Linear:
    """What two steps give of which a GradScaler skips the first; memory that is not written is NaN."""
    net, scaler = model(), torch.amp.GradScaler("cpu")
    optimizer = make(net)
    torch.use_deterministic_algorithms(True)
    try:
        for value in (torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(net(torch.full((1, 3), value)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    return net


def test_a_first_step_that_a_scaler_skips_leaves_no_momentum():
    sgd = SGD(name="sgd", lr=0.1, momentum=0.9)
    ours = after_a_skipped_step(lambda net: make_optimizer(net, sgd, scaled=True))
    assert torch.allclose(ours.weight, model().weight - 0.1)
    fused = after_a_skipped_step(lambda net: make_optimizer(net, sgd))
    assert fused.weight.isnan().all(), "control: torch's fused SGD has learned to skip its first step, and can be used"
