from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fahooks
from fahooks.hooks.freeze_signs import keep_side
from fahooks.plugins import InputError


def signs(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.sign() for name, p in model.named_parameters() if "weight" in name}


def flips(before: dict[str, Tensor], model: nn.Module) -> int:
    return sum(int((sign != before[name]).sum()) for name, sign in signs(model).items())


def test_no_sign_changes_after_the_freeze(net: Callable[..., Any], learn: Callable[..., None]):
    model, plain = net(), net()
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, plain))
    fahooks.attach(model, optimizer, fahooks.FreezeSigns(after=3))
    start = signs(model)
    learn(model, optimizer, 3)
    learn(plain, other, 3)
    frozen = signs(model)
    assert flips(start, model) > 0, "control: signs change before the freeze"
    assert flips(frozen, plain) == 0
    for _ in range(20):
        learn(model, optimizer, 1)
        learn(plain, other, 1)
        assert flips(frozen, model) == 0
    assert flips(frozen, plain) > 0, "control: signs change without the hook"
    assert all((p != 0).all() for name, p in model.named_parameters() if "weight" in name)
    assert model.conv.weight.abs().min().item() == pytest.approx(1e-8), "control: a weight was clipped"


@pytest.mark.parametrize(("after", "total", "expected"), [(0, None, 0), (0.5, 8, 4), (0.05, 30, 2), (4, 8, 4)])
def test_signs_freeze_when_they_should(
    after: float, total: int | None, expected: int, net: Callable[..., Any], learn: Callable[..., None]
):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    fahooks.attach(model, optimizer, {"name": "freeze_signs", "after": after}, total_steps=total)
    held = []
    for _ in range(6):
        with torch.no_grad():
            model.dense.weight.neg_()
        before = model.dense.weight.sign()
        learn(model, optimizer, 1)
        held.append(bool((model.dense.weight.sign() != before).float().mean() > 0.9))
    # Frozen before the first step, signs are those before the first flip; frozen after step n, flip n + 1 is the first undone.
    assert held.index(True) == expected


def test_a_weight_that_is_zero_takes_the_side_of_its_first_value(net: Callable[..., Any], learn: Callable[..., None]):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model.dense.weight[0] = 0
    others = model.dense.weight[1:].sign()
    handle = fahooks.attach(model, optimizer, fahooks.FreezeSigns(after=0))
    for _ in range(2):
        with torch.no_grad():
            model.dense.weight.neg_()
        learn(model, optimizer, 1)
        assert (model.dense.weight[0] == 0).all()
        assert torch.equal(model.dense.weight[1:].sign(), others), "those of the others are frozen meanwhile"
    state = handle.state_dict()
    state = {**state, "hooks": [{name: side.clone() for name, side in state["hooks"][0].items()}]}
    for first in (-0.5, 0.5):
        with torch.no_grad():
            model.dense.weight[0] = first
        learn(model, optimizer, 1)
        for later in (0.25, -0.25):
            with torch.no_grad():
                model.dense.weight[0] = later
            learn(model, optimizer, 1)
            kept = model.dense.weight[0].tolist()
            assert kept == pytest.approx([later if later * first > 0 else 1e-8 if first > 0 else -1e-8] * 24, rel=1e-6)
        handle.load_state_dict(state)  # in which the weights are free


@pytest.mark.parametrize(("after", "first"), [(0, 1), (1, 1), (4, 4), (0.3, 3), (0.04, 1)])
def test_when_it_begins_is_known_before(after: float, first: int, net: Callable[..., Any], learn: Callable[..., None]):
    assert fahooks.FreezeSigns(after=after).begins(10) == first
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if first > 3:
        with pytest.raises(
            InputError, match=f"^hook 'freeze_signs' does nothing: it begins at step {first}, and training has no more than 3$"
        ):
            fahooks.attach(model, optimizer, fahooks.FreezeSigns(after=after), total_steps=3)
    fahooks.attach(model, optimizer, fahooks.FreezeSigns(after=after, margin=0.5), total_steps=10)
    for step in range(1, 6):
        learn(model, optimizer, 1)
        assert bool(model.dense.weight.abs().min() >= 0.5) == (step >= first), step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, 1e-8, 0.01])
def test_a_clipped_weight_is_never_zero(dtype: torch.dtype, margin: float):
    weight = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5], dtype=dtype)
    side = torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0], dtype=dtype)
    keep_side(weight, side, margin)
    assert torch.equal(weight.sign(), side)
    assert weight[3:].tolist() == [0.5, -0.5]
    least = max(margin, torch.finfo(dtype).tiny)
    assert weight[:3].abs().double().tolist() == pytest.approx([least] * 3, rel=1e-2)
    assert (weight.abs() >= torch.finfo(dtype).tiny).all()


@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.sampled_from([-1.0, 1.0])), min_size=1))
def test_only_weights_on_the_wrong_side_are_changed(drawn: list[tuple[float, float]]):
    weight, side = torch.tensor(drawn, dtype=torch.float64).T.contiguous()
    before = weight.clone()
    keep_side(weight, side, 1e-3)
    assert torch.equal(weight, torch.where(before * side >= 1e-3, before, 1e-3 * side))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after": -1}, "after must be a number of steps, .*, or a fraction of training above 0 and below 1, got -1"),
        ({"after": 0.0}, r"after=0 is the start.*, or a fraction of training above 0 and below 1, got 0\.0"),
        ({"after": 1.0}, r"after must be .* a fraction of training above 0 and below 1, got 1\.0"),
        ({"after": True}, "got True"),
        ({"after": "5"}, "got '5'"),
        ({"margin": -1e-3}, "margin must be a number of at least 0, got -0.001"),
        ({"margin": float("nan")}, "got nan"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        fahooks.FreezeSigns(**options)


def test_a_fraction_needs_the_whole(net: Callable[..., Any]):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"freeze_signs: after=0.05 is a fraction of training: give attach total_steps"):
        fahooks.attach(model, optimizer, "freeze_signs")
    fahooks.attach(model, optimizer, "freeze_signs", total_steps=100)
