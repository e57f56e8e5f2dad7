from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import fahooks
from fahooks.plugins import InputError
from fahooks.probes import degrees
from fahooks.rules import WeightMirror
from fahooks.surgery import feedback_rules

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(30, 20), (30,)),
    "conv": (nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding=1), (4, 7, 7)),
    "conv_transpose": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 7)),
}

each_layer = pytest.mark.parametrize("name", LAYERS)


def mirrored(name: str, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """W and B after some steps of training towards zero."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer.reset_parameters()  # pyright: ignore[reportCallIssue]
    fahooks.convert(layer, "wm", **options)
    optimizer = SGD(layer.parameters(), lr=1e-3)
    handle = fahooks.attach(layer, optimizer)
    x = torch.randn(8, *shape)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) ** 2).mean().backward()
        optimizer.step()
    matrix = feedback_rules(layer)[""].get_buffer("matrix").clone()
    handle.remove()
    weight = layer.get_parameter("weight").detach().clone()
    fahooks.revert(layer)
    return weight, matrix


@each_layer
def test_the_angle_falls_below_fifteen_degrees(name: str):
    weight, matrix = mirrored(name, 0)
    assert degrees(weight, matrix) > 60, "control: they begin apart"
    weight, matrix = mirrored(name, 500)
    assert degrees(weight, matrix) < 15


@each_layer
def test_what_the_noise_gives_is_the_weight_on_average(name: str):
    weight, matrix = mirrored(name, 1, rate=1.0, samples=200_000)
    torch.testing.assert_close(matrix, weight, rtol=0, atol=0.02 * weight.norm().item())
    rough = mirrored(name, 1, rate=1.0, samples=4)[1]
    assert (rough - weight).norm() > 0.3 * weight.norm(), "control: a few samples do not tell it"


def test_the_noise_is_a_function_of_the_seed_and_of_the_step():
    first, again = mirrored("linear", 3)[1], mirrored("linear", 3)[1]
    assert torch.equal(first, again)
    layer, other = nn.Linear(30, 20), nn.Linear(30, 20)
    weight = nn.Parameter(layer.weight.detach())
    fahooks.convert(layer, "wm")
    fahooks.convert(other, "wm")
    state = torch.get_rng_state()
    rule = feedback_rules(layer)[""]
    rule.after_step(weight)
    saved = {key: value.clone() for key, value in rule.state_dict().items()}
    rule.after_step(weight)
    resumed = feedback_rules(other)[""]
    resumed.load_state_dict(saved)
    resumed.after_step(weight)
    assert torch.equal(resumed.get_buffer("matrix"), rule.get_buffer("matrix"))
    assert not torch.equal(resumed.get_buffer("matrix"), saved["matrix"])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": 1.5}, {"samples": 0}, {"gain": -1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        WeightMirror(**options)  # pyright: ignore[reportArgumentType]
