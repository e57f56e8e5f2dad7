from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.plugins import InputError

# Layers, and the input that their units are counted on.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(5, 3, 2), (5, 3)),
    "conv_transpose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 3, 3)),
}

each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def outgoing(layer: Any, shape: tuple[int, ...]) -> list[Tensor]:
    """For each input unit, which weights leave it: those that an input to that unit alone reaches."""
    masks = []
    for unit in range(shape[0]):
        x = torch.zeros(1, *shape)
        x[0, unit] = 1
        (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        masks.append(gradient != 0)
    return masks


def signs(weight: Tensor, masks: list[Tensor]) -> list[set[float]]:
    """The signs that each unit's outgoing weights have."""
    return [set(weight[mask].sign().tolist()) for mask in masks]


def train(layer: nn.Module, shape: tuple[int, ...], optimizer: torch.optim.Optimizer, steps: int = 10) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(3, *shape, generator=generator)).square().sum().backward()
        optimizer.step()


@each_layer
def test_every_outgoing_weight_keeps_the_sign_of_its_unit(make: Callable[[], nn.Module], shape: tuple[int, ...]):
    torch.manual_seed(0)
    layer: Any = make()
    before = layer.weight.detach().clone()
    masks = outgoing(layer, shape)
    assert sum(int(mask.sum()) for mask in masks) == before.numel()
    assert {-1.0, 1.0} in signs(before, masks), "control: a unit has weights of both signs"
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    fahooks.attach(layer, optimizer, "dale")
    assert torch.equal(layer.weight.abs(), before.abs())
    expected = [{before[mask].sum().sign().item()} for mask in masks]
    assert signs(layer.weight, masks) == expected
    train(layer, shape, optimizer)
    assert signs(layer.weight, masks) == expected
    assert layer.weight.abs().min().item() == pytest.approx(1e-8), "control: a weight was clipped"


@each_layer
@pytest.mark.parametrize("excitatory", [0.0, 0.5, 0.8, 1.0])
def test_a_fraction_of_the_units_is_excitatory(make: Callable[[], nn.Module], shape: tuple[int, ...], excitatory: float):
    def drawn(seed: int) -> list[set[float]]:
        torch.manual_seed(0)
        layer: Any = make()
        fahooks.attach(layer, torch.optim.SGD(layer.parameters()), fahooks.Dale(excitatory=excitatory), seed=seed)
        return signs(layer.weight, outgoing(layer, shape))

    assert sum(unit == {1.0} for unit in drawn(0)) == round(excitatory * shape[0])
    assert all(len(unit) == 1 for unit in drawn(0))
    assert drawn(0) == drawn(0)
    if excitatory == 0.5:
        assert any(drawn(0) != drawn(seed) for seed in range(1, 8))


def test_a_net_still_learns(net: Callable[..., Any], learn: Callable[..., None]):
    model = net("usf_init")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    fahooks.attach(model, optimizer, "dale")
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1])

    def loss() -> float:
        return nn.functional.cross_entropy(model(x), labels).item()

    start = loss()
    learn(model, optimizer, 60)
    assert loss() < 0.5 * start


@pytest.mark.parametrize("options", [{"excitatory": 1.5}, {"excitatory": "half"}, {"margin": -1}])
def test_wrong_options_are_refused(options: dict[str, Any]):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"{name} must be a number .*got {value!r}"):
        fahooks.Dale(**options)
