from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fahooks
from fahooks.rules import Backprop, Sham


@pytest.mark.parametrize("rule", ["bp", Backprop, {"*": "bp"}, {"rule": "bp"}], ids=str)
def test_backprop_leaves_the_layer_as_it_is(rule: Any) -> None:
    layer = nn.Linear(3, 2)
    report = fahooks.convert(layer, rule)
    assert type(layer) is nn.Linear
    assert report.converted == [] and report.skipped == {"": "rule bp: left as it is"}
    fahooks.convert(layer, "sham")
    assert type(layer) is not nn.Linear, "control: another rule converts it"


@pytest.mark.parametrize("rule", ["sham", Sham])
def test_sham_goes_through_the_feedback_path_and_gives_the_true_gradient(learn: Callable[..., Any], rule: Any) -> None:
    torch.manual_seed(0)
    plain, converted, other = (nn.Linear(5, 3) for _ in range(3))
    for layer in (converted, other):
        layer.load_state_dict(plain.state_dict())
    x = torch.randn(4, 5)
    fahooks.convert(converted, rule)
    fahooks.convert(other, "fa")
    learn(converted, x).assert_same_bits(learn(plain, x))
    assert converted(x.requires_grad_()).grad_fn.name() == "_LinearBackward"
    with pytest.raises(AssertionError):
        learn(other, x).assert_same_bits(learn(plain, x))


def test_both_map_a_weight_to_itself() -> None:
    weight = torch.randn(2, 3)
    assert Backprop()(weight) is weight and Sham()(weight) is weight
