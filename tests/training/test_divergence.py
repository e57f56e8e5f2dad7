from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.recipe import Recipe, load
from fahooks.training import loop
from fahooks.training.divergence import first_not_finite
from fahooks.training.loop import Diverged, train
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare

from .conftest import SOURCE


class Bad(torch.autograd.Function):
    """The identity, whose backward pass gives nan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Tensor:
        return errors[0] * math.nan


class BadBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Bad.apply(x)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 0).log()


def model(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), middle, nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))


def blamed(net: nn.Module, **options: Any) -> str | None:
    x = torch.randn(6, 3)
    return first_not_finite(net, lambda: net(x).square().mean(), **options)


def test_nothing_is_blamed_where_all_is_finite_and_the_model_is_as_it_was():
    net = model(nn.Linear(4, 4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.randn(6, 3)
    torch.set_rng_state(state)
    assert blamed(net) is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    torch.set_rng_state(state)
    assert torch.equal(torch.randn(6, 3), x)


@pytest.mark.parametrize("rule", [None, "fa", "dfa"])
def test_the_layer_that_made_it_in_the_forward_pass_is_named(rule: str | None):
    net = model(Log())
    if rule is not None:
        fahooks.convert(net, rule)
    assert blamed(net) == "layer '2' gave inf in the forward pass, from finite inputs and weights"


@pytest.mark.parametrize("rule", [None, "fa", "usf_sn"])
def test_a_weight_that_is_not_finite_is_named(rule: str | None):
    net = model(nn.Linear(4, 4))
    if rule is not None:
        fahooks.convert(net, rule)
    with torch.no_grad():
        net.get_parameter("2.weight")[0, 0] = math.nan
    assert blamed(net) == "layer '2' gave nan in the forward pass, from its weight, which was not finite"


@pytest.mark.parametrize("rule", [None, "fa"])
def test_the_layer_that_made_it_in_the_backward_pass_is_named(rule: str | None):
    net = model(BadBackward())
    if rule is not None:
        fahooks.convert(net, rule)
    assert blamed(net) == "layer '2' sent an error of nan below in the backward pass, of a finite one"
    assert blamed(net, backward=False) is None


def test_between_two_branches_the_right_one_is_named():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.Linear(4, 4), BadBackward()

        def forward(self, x: Tensor) -> Tensor:
            return self.good(x) + self.bad(x)

    found = blamed(model(Residual()))
    assert found == "layer '2.bad' sent an error of nan below in the backward pass, of a finite one"


def test_a_feedback_matrix_that_is_not_finite_is_found():
    net = model(nn.Linear(4, 4))
    fahooks.convert(net, "fa")
    net.get_buffer("2.feedback.matrix")[0, 0] = math.inf
    found = blamed(net)
    assert found is not None and found.startswith("layer '2' sent an error of") and "of a finite one" in found


class Steep(torch.autograd.Function):
    """x + weight, where the error of x is finite and the gradient of the weight is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x + weight

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor]:
        return errors[0], torch.full_like(errors[0][0], math.inf)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return Steep.apply(x, self.weight)


@pytest.mark.parametrize("rule", [None, "fa", "dfa"])
@pytest.mark.parametrize("order", [("early", "late"), ("late", "early")], ids=" ".join)
def test_of_several_gradients_the_first_of_the_backward_pass_is_named(order: tuple[str, str], rule: str | None):
    class Two(nn.Module):
        """Its parameters are in either order, and its forward pass in one."""

        def __init__(self) -> None:
            super().__init__()
            for name in order:
                setattr(self, name, Shift())

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("late")(self.get_submodule("early")(x).tanh())

    net = model(Two())
    if rule is not None:
        fahooks.convert(net, rule)
    assert blamed(net) == "'2.late.weight' got a gradient of inf in the backward pass"
    assert not any(p._backward_hooks for p in net.parameters())


def test_a_gradient_is_named_before_the_error_that_a_layer_below_sends():
    net = nn.Sequential(nn.Linear(3, 4), BadBackward(), Shift(), nn.Linear(4, 2))
    assert blamed(net) == "'2.weight' got a gradient of inf in the backward pass"
    net = nn.Sequential(nn.Linear(3, 4), Shift(), BadBackward(), nn.Linear(4, 2))
    assert blamed(net) == "layer '2' sent an error of nan below in the backward pass, of a finite one", "control"


def test_what_happens_outside_of_layers_is_named_by_the_layer_before():
    net = nn.Sequential(nn.Linear(3, 3))
    x = torch.ones(2, 3)
    assert first_not_finite(net, lambda: net(x).sum() * math.inf) == "the loss was inf, of outputs that are finite"
    # The square root has no finite derivative at zero, of which the loss itself shows nothing.
    found = first_not_finite(net, lambda: (net(x) * 0).sqrt().sum())
    assert found == "layer '0' got an error of nan from above, in the backward pass"


def test_a_run_that_diverges_says_at_which_step_and_in_which_layer_and_keeps_its_checkpoint(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny("checkpoint.every=3", "feedback=[{rule: fa}]")
    setup = prepare(recipe)
    real, calls = loop.take_step, []

    def poisoned(*arguments: Any) -> Any:
        """After the seventh step a weight is as an update with an infinite gradient leaves it."""
        result = real(*arguments)
        calls.append(1)
        if len(calls) == 7:
            with torch.no_grad():
                setup.model.get_parameter("conv2.weight")[0] = math.nan
        return result

    monkeypatch.setattr(loop, "take_step", poisoned)
    monkeypatch.setattr("fahooks.training.divergence.take_step", poisoned)
    calls.clear()
    run = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path / "run")
    with pytest.raises(
        Diverged, match="taken again, the same steps stay finite; --resume goes on from .*step-000000006.pt, "
    ):  # poisoned only once
        train(setup, run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000006.pt"]
    assert run.read_status()["state"] == "failed"


def test_a_learning_rate_that_is_too_high_is_traced(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    setup = prepare(tiny("optim={name: sgd, lr: 1.0e+30}", "feedback=[{rule: bp}]"))
    run = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path / "my run")
    with pytest.raises(Diverged) as caught:
        train(setup, run)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("the loss was nan by step 5, in epoch 1: first at step 2, layer '")
    assert message.endswith(
        f"; --resume would come to the same from {run.checkpoints}/step-000000000.pt, the last checkpoint; start anew "
        f"with a lower optim.lr, as by `fahooks train '{run.path}/resolved.yaml' --set optim.lr=1e+29`, or with train.clip_norm"
    )
    assert prepare(load(str(run.path / "resolved.yaml"), ["optim.lr=1e+29"])).recipe.optim.lr == 1e29, "what it says can be done"
    assert json.loads((run.path / "status.json").read_text())["reason"] == message
    assert "are taken again, to find where that came from" in capsys.readouterr().out


ONE_STEP = ("data.limit=60", "data.batch_size=500", "data.validation=10", "train.epochs=1", "feedback=[{rule: bp}]")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{name: sgd, lr: 1.0e+38}", "the validation loss was (nan|inf), in evaluation mode: "),
        (
            "{name: sgd, lr: 3.0e+38, momentum: 0.9, weight_decay: 10}",
            r"the validation loss was nan, in evaluation mode: first at step 1, '\S+' was (nan|inf) after the optimizer's step; ",
        ),
    ],
)
def test_a_last_step_that_ruins_the_weights_is_no_finished_run(
    optimizer: str, message: str, tiny: Callable[..., Recipe], tmp_path: Path
):
    setup = prepare(tiny(f"optim={optimizer}", *ONE_STEP))
    run = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path / "run")
    with pytest.raises(Diverged, match=f"^{message}"):
        train(setup, run)
    assert run.read_status()["state"] == "failed" and not run.best.exists()


def test_no_checkpoint_is_made_of_weights_that_are_not_finite(tiny: Callable[..., Recipe], tmp_path: Path):
    setup = prepare(tiny("checkpoint.every=1", "optim={name: sgd, lr: 3.0e+38, momentum: 0.9, weight_decay: 10}", *ONE_STEP[3:]))
    run = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path / "run")
    with pytest.raises(
        Diverged, match="^a weight, or a running statistic, was infinite or not a number after step 1: first at step 1"
    ):
        train(setup, run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000000.pt"]
