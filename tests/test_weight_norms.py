"""Weights that are made of other tensors before each call: spectral_norm, weight_norm, parametrizations, pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fahooks
from fahooks.reference import oracle
from fahooks.surgery import FeedbackLayer, feedback_layers, feedback_rules

Learn = Callable[..., Any]
Change = Callable[[nn.Module], Any]

RULES = ["fa", "usf", "usf_init", "usf_sn"]


class Halved(nn.Module):
    """A parametrization without state of its own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


PARAMETRIZED: dict[str, Change] = {
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "two, one upon the other": lambda layer: parametrizations.spectral_norm(halve(layer)),
    "one that changes nothing": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
}
HOOKED: dict[str, Change] = {
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}
REMOVE: dict[str, Change] = {
    **{name: lambda layer: parametrize.remove_parametrizations(layer, "weight") for name in PARAMETRIZED},
    "old spectral_norm": lambda layer: nn.utils.remove_spectral_norm(layer),
    "old weight_norm": lambda layer: nn.utils.remove_weight_norm(layer),
    "pruned": lambda layer: prune.remove(layer, "weight"),
}

each_norm = pytest.mark.parametrize("norm", [*PARAMETRIZED, *HOOKED])
each_order = pytest.mark.parametrize("converted_first", [False, True], ids=["normalised first", "converted first"])

# torch names its successors where the old functions are called, and tells so each time.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def halve(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Halved())


def normalise(model: nn.Module, norm: str) -> None:
    """Change the second and the third layer; the same way each time."""
    for name in ("1", "3"):
        torch.manual_seed(3)
        (PARAMETRIZED | HOOKED)[norm](model.get_submodule(name))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def images() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def pair(norm: str, rule: Any = "fa", converted_first: bool = False) -> tuple[nn.Sequential, nn.Sequential]:
    """A plain model and a converted one, both normalised."""
    plain, converted = network(), network()
    normalise(plain, norm)
    if converted_first:
        fahooks.convert(converted, rule)
    normalise(converted, norm)
    if not converted_first:
        fahooks.convert(converted, rule)
    return plain, converted


@each_norm
@each_order
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_the_oracle(learn: Learn, norm: str, rule: str, converted_first: bool, training: bool) -> None:
    plain, converted = (model.train(training) for model in pair(norm, rule, converted_first))
    surrogate, _ = pair(norm)
    surrogate.train(training)
    rules = feedback_rules(converted)
    assert list(rules) == ["0", "1", "3", "4"]
    # Several passes: what a norm carries from one to the next moves alike.
    for _ in range(3):
        expected = learn(surrogate, images(), around=lambda: oracle(surrogate, rules))
        learn(converted, images()).assert_oracle(expected, learn(plain, images()))


@each_norm
@each_order
def test_sham_is_backpropagation_to_the_last_bit(learn: Learn, norm: str, converted_first: bool) -> None:
    plain, converted = pair(norm, "sham", converted_first)
    learn(converted, images()).assert_same_bits(learn(plain, images()))


@each_norm
@each_order
def test_feedback_has_the_signs_of_the_weight_that_is_used(norm: str, converted_first: bool) -> None:
    seen: list[Tensor] = []

    def note(weight: Tensor) -> Tensor:
        seen.append(weight.clone())
        return weight

    plain, converted = pair(norm, note, converted_first)
    converted.eval()(images().requires_grad_()).sum().backward()
    plain.eval()(images())
    used: list[Any] = [plain[i].weight for i in (4, 3, 1, 0)]
    assert all(torch.equal(found, expected) for found, expected in zip(seen, used, strict=True))
    if norm != "one that changes nothing" and "weight_norm" not in norm:
        assert not torch.equal(seen[1], network().get_parameter("3.weight")), "control: the weight is as it was"


@each_norm
def test_converting_does_not_move_the_norm(norm: str) -> None:
    plain, converted = pair(norm)
    torch.testing.assert_close({k: converted.state_dict()[k] for k in plain.state_dict()}, plain.state_dict(), rtol=0, atol=0)


@each_norm
@each_order
def test_revert_leaves_the_norm(learn: Learn, norm: str, converted_first: bool) -> None:
    plain, model = pair(norm, "usf_init", converted_first)
    fahooks.revert(model)
    assert not any(isinstance(module, FeedbackLayer) for module in model.modules())
    assert [type(module).__name__ for module in model.modules()] == [type(module).__name__ for module in plain.modules()]
    assert [type(module).__mro__[-3:] for module in model.modules()] == [type(module).__mro__[-3:] for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    learn(model, images()).assert_same_bits(learn(plain, images()))


@each_norm
@each_order
@pytest.mark.parametrize("reverted_first", [False, True], ids=["norm removed first", "reverted first"])
def test_norm_and_feedback_come_off_in_either_order(learn: Learn, norm: str, converted_first: bool, reverted_first: bool) -> None:
    plain, model = pair(norm, "fa", converted_first)

    def remove(net: nn.Module) -> None:
        for name in ("1", "3"):
            REMOVE[norm](net.get_submodule(name))

    remove(plain)
    if reverted_first:
        fahooks.revert(model)
        remove(model)
    else:
        remove(model)
        assert list(feedback_layers(model)) == ["0", "1", "3", "4"]
        assert learn(model, images()).distance(learn(plain, images())) > 0.01
        fahooks.revert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in network().modules()]
    assert set(model.state_dict()) == set(network().state_dict())
    learn(model, images()).assert_same_bits(learn(plain, images()))


@pytest.mark.parametrize("norm", PARAMETRIZED)
@each_order
def test_deepcopy(learn: Learn, norm: str, converted_first: bool) -> None:
    _, model = pair(norm, "usf_init", converted_first)
    twin = copy.deepcopy(model)
    learn(twin.eval(), images()).assert_same_bits(learn(model.eval(), images()))
    assert all(rule is not feedback_rules(model)[name] for name, rule in feedback_rules(twin).items())


@each_norm
@each_order
def test_converting_again_changes_nothing(norm: str, converted_first: bool) -> None:
    _, model = pair(norm, "fa", converted_first)
    rules, classes = feedback_rules(model), {name: type(module).__name__ for name, module in model.named_modules()}
    fahooks.convert(model, "fa")
    assert all(rule is rules[name] for name, rule in feedback_rules(model).items())
    assert {name: type(module).__name__ for name, module in model.named_modules()} == classes


def test_a_plain_parametrized_checkpoint_loads_strictly() -> None:
    plain, model = pair("spectral_norm")
    plain(images())
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model.eval()(images()), plain.eval()(images()))
