from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fahooks.rules.drawing import DrawingRule, random_matrix

CPU = torch.device("cpu")


def drawing() -> DrawingRule:
    rule = DrawingRule()
    rule.initialise(torch.ones(2, 2), fan_in=2, fan_out=2, generator=torch.Generator().manual_seed(5))
    return rule


def following(rule: DrawingRule) -> Tensor:
    return rule.next_draw(torch.ones(1), (3,), "normal", 1.0)


@pytest.mark.parametrize(("distribution", "kurtosis"), [("normal", 3.0), ("uniform", 1.8)])
def test_a_random_matrix_has_the_moments_that_were_asked_for(distribution: str, kurtosis: float) -> None:
    sample = random_matrix((200, 100), CPU, distribution, 0.5, 7).double()
    assert abs(sample.mean().item()) < 5 * 0.5 / 20000**0.5
    assert abs(sample.var().item() / 0.25 - 1) < 5 * (2 / 20000) ** 0.5
    assert ((sample / sample.std()) ** 4).mean().item() == pytest.approx(kurtosis, rel=0.1)


def test_a_random_matrix_is_a_function_of_its_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = (random_matrix((4, 3), CPU, "normal", 1.0, seed) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"


@pytest.mark.parametrize("draw", [None, torch.tensor(3)], ids=["one", "one of a series"])
def test_the_operation_is_what_it_says_to_compilers(draw: Tensor | None) -> None:
    arguments: Any = ((4, 3), CPU, "uniform", 1.0, 7, draw)
    # Not "test_schema", which can not look into a device.
    opcheck(random_matrix, arguments, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"))


def test_a_rule_that_draws_counts_its_draws() -> None:
    rule, other = drawing(), drawing()
    first, second = following(rule), following(rule)
    assert not torch.equal(first, second)
    assert torch.equal(following(other), first)
    twin = copy.deepcopy(rule)
    third = following(rule)
    other.load_state_dict({"_extra_state": torch.tensor(2)})
    assert torch.equal(following(other), third)
    assert torch.equal(following(twin), third), "a copy draws from its original's count"


def test_draws_take_the_dtype_of_what_they_are_for() -> None:
    assert drawing().next_draw(torch.ones(1).double(), (2, 2), "uniform", 1.0).dtype == torch.float64
