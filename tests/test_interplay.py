"""Feedback layers with what torch does around a model: autocast, activation checkpointing, functional calls, other modes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fahooks
from fahooks.reference import oracle
from fahooks.surgery import feedback_rules

Learn = Callable[..., Any]

RULES = ["fa", "usf", "usf_init", "usf_sn"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def pair(rule: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    plain = network().to(dtype)
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule)
    return plain, converted


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_keeps_the_outputs_and_sends_the_error_through_feedback(learn: Learn, rule: str) -> None:
    plain, converted = pair(rule)
    surrogate = copy.deepcopy(plain)
    rules = feedback_rules(converted)

    @contextmanager
    def half_surrogate() -> Iterator[None]:
        with half(), oracle(surrogate, rules):
            yield

    found, true = learn(converted, images(), around=half), learn(plain, images(), around=half)
    torch.testing.assert_close(found.outputs, true.outputs, rtol=0, atol=0)
    assert found.outputs[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}
    expected = learn(surrogate, images(), around=half_surrogate)
    assert found.distance(expected) < 0.03 < found.distance(true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sham_under_autocast_is_backpropagation_to_the_last_bit(learn: Learn, dtype: torch.dtype) -> None:
    plain, converted = pair("sham")
    around = partial(torch.autocast, "cpu", dtype)
    learn(converted, images(), around=around).assert_same_bits(learn(plain, images(), around=around))
    assert learn(plain, images()).distance(learn(plain, images(), around=around)) > 1e-4, "control: nothing was cast"


def test_sham_of_a_layer_called_twice_under_autocast_adds_its_gradients_in_full_precision(learn: Learn) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    plain = nn.Sequential(layer, nn.Tanh(), layer)
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, "sham")
    x = torch.randn(16, 8)
    # With its cache of cast weights, torch adds the two gradients in bfloat16.
    uncached = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    learn(converted, x, around=half).assert_same_bits(learn(plain, x, around=uncached))
    assert learn(converted, x, around=half).distance(learn(plain, x, around=half)) < 0.01


class Checkpointed(nn.Module):
    """Runs a model in three segments that are computed again in the backward pass."""

    def __init__(self, model: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.model = model
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint_sequential(self.model[:6], 2, x, use_reentrant=self.reentrant)
        output: Any = checkpoint(self.model[6:], x, use_reentrant=self.reentrant)
        return output


@pytest.mark.parametrize("rule", ["sham", *RULES])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("around", [None, half], ids=["full precision", "autocast"])
def test_checkpointing_changes_no_gradient(learn: Learn, rule: str, reentrant: bool, around: Any) -> None:
    plain, converted = pair(rule)
    options = {"around": around} if around else {}

    expected = learn(converted, images(), **options)
    found = learn(Checkpointed(converted, reentrant), images(), **options)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=0)
    found_gradients = {name.removeprefix("model."): gradient for name, gradient in found.gradients.items()}
    torch.testing.assert_close(found_gradients, expected.gradients, rtol=0, atol=0)
    if rule != "sham":
        assert expected.distance(learn(plain, images(), **options)) > 0.01, "control: backpropagation gives the same"


@pytest.mark.parametrize("reentrant", [True, False])
def test_backprop_holds_for_checkpoints_recomputed_inside(reentrant: bool) -> None:
    plain, converted = pair("fa")
    gradients: list[Tensor | None] = []
    for model in (plain, converted):
        x = images().requires_grad_()
        with fahooks.backprop(model):
            torch.manual_seed(0)
            output: Any = checkpoint(model, x, use_reentrant=reentrant)
            output.sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_functional_call_uses_the_given_weights_and_their_rules(learn: Learn, rule: str) -> None:
    plain, converted = pair(rule, torch.float64)
    torch.manual_seed(5)
    weights = {name: torch.randn_like(parameter).requires_grad_() for name, parameter in plain.named_parameters()}
    in_place = copy.deepcopy(converted)
    in_place.load_state_dict(weights, strict=False)
    x = images().double()
    torch.manual_seed(0)
    output = torch.func.functional_call(converted, weights, x)
    cotangent = torch.randn_like(output)
    expected = learn(in_place, x)
    torch.testing.assert_close([output.detach()], expected.outputs, rtol=0, atol=0)
    gradients = dict(zip(weights, torch.autograd.grad(output, list(weights.values()), cotangent), strict=True))
    del expected.gradients["input 0"]
    torch.testing.assert_close(gradients, expected.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("rule", fahooks.list_rules())
def test_a_training_by_any_rule_goes_on_from_its_state_with_the_same_bits(rule: str) -> None:
    labels = torch.tensor([0, 1, 2, 1])

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = network()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.2, 0.2)
        fahooks.convert(model, rule)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
        hooks = [fahooks.FreezeSigns(after=2), "alignment", fahooks.ConstantNorm(time_constant=3.0)]
        return model, optimizer, fahooks.attach(model, optimizer, *hooks)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            with fahooks.targets(model, labels):
                output = model(images())
            nn.functional.cross_entropy(output, labels).backward()
            optimizer.step()

    model, optimizer, _ = first = made(seed=0)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    train(model, optimizer, range(3, 6))
    other, again, _ = resumed = made(seed=1)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    before = copy.deepcopy(other.state_dict())
    train(other, again, range(3, 6))
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(other.state_dict()["7.weight"], before["7.weight"]), "control: it went on"


def test_inference_mode_keeps_the_outputs() -> None:
    plain, converted = (model.eval() for model in pair("fa"))
    with torch.inference_mode():
        found = converted(images())
        assert torch.equal(found, plain(images()))
    assert found.is_inference()


def test_anomaly_mode_finds_nothing(learn: Learn) -> None:
    _, converted = pair("usf_sn")
    expected = learn(converted, images())
    learn(converted, images(), around=partial(torch.autograd.set_detect_anomaly, True)).assert_same_bits(expected)


def test_weights_changed_between_forward_and_backward_are_an_error() -> None:
    _, converted = pair("fa")
    output = converted(images().requires_grad_()).sum()
    with torch.no_grad():
        converted.get_parameter("7.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
