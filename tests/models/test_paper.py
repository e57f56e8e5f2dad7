from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fahooks import models
from fahooks.plugins import InputError


class Conv(NamedTuple):
    kernel: int
    width: int
    stride: int = 1
    relu: bool = True


class Dense(NamedTuple):
    width: int
    relu: bool = True


CLASSES = 0  # the width of an output: 10 or 1000

POOL, AVERAGE = "2x2 max-pool stride 2", "global average pooling"


class Drop(NamedTuple):
    probability: float


# Supplementary Tables 2 and 3, row by row, and the dropout of section 7.1.
TABLES = {
    "paper/mnist": [Conv(5, 32), POOL, Conv(5, 64), POOL, Dense(1024), Drop(0.5), Dense(CLASSES, relu=False)],
    "paper/cifar10-1": [Conv(5, 64), POOL, Conv(5, 64), POOL, Dense(384), Dense(192), Dense(CLASSES, relu=False)],
    "paper/cifar10-2": [
        Drop(0.2),
        Conv(3, 96),
        Conv(3, 96),
        Conv(3, 96, 2),
        Drop(0.5),
        Conv(3, 192),
        Conv(3, 192),
        Conv(3, 192, 2),
        Drop(0.5),
        Conv(3, 192),
        Conv(1, 192),
        Conv(1, CLASSES, relu=False),
        AVERAGE,
    ],
    "paper/imagenet-1": [Conv(9, 192, 2), POOL, Conv(5, 192, 2), POOL, Dense(512), Dense(512), Dense(CLASSES, relu=False)],
    "paper/imagenet-2": [
        Drop(0.2),
        Conv(9, 192, 4),
        Conv(3, 192, 2),
        Conv(3, 192, 3),
        Drop(0.5),
        Conv(5, 256, 2),
        Conv(3, 256),
        Conv(3, 256, 2),
        Drop(0.5),
        Conv(3, 512),
        Conv(1, 512),
        Conv(1, CLASSES, relu=False),
        AVERAGE,
    ],
}

LAYERS = {
    "paper/mnist": ["conv1", "conv2", "dense", "output"],
    **dict.fromkeys(("paper/cifar10-1", "paper/imagenet-1"), ["conv1", "conv2", "dense1", "dense2", "output"]),
    **dict.fromkeys(("paper/cifar10-2", "paper/imagenet-2"), [*(f"conv{i}" for i in range(1, 9)), "output"]),
}

# The input that the tables name, the map before the dense layers or the averaging, and the number of parameters.
SIZES = {
    "paper/mnist": ((1, 28, 28), 7, 3_274_634),
    "paper/cifar10-1": ((3, 24, 24), 6, 1_068_298),
    "paper/cifar10-2": ((3, 32, 32), 8, 1_369_738),
    "paper/imagenet-1": ((3, 299, 299), 19, 37_232_552),
    "paper/imagenet-2": ((3, 299, 299), 4, 5_075_816),
}


def as_tabulated(
    name: str, model: nn.Module, x: Tensor, classes: int, activation: Callable[[Tensor], Tensor] = F.relu
) -> tuple[Tensor, int]:
    """Logits by the rows of the table with the parameters of `model`, and the side of the last map."""
    parameters = iter([(model.get_parameter(f"{n}.weight"), model.get_parameter(f"{n}.bias")) for n in LAYERS[name]])
    side = 0
    for row in TABLES[name]:
        side = x.shape[2] if x.dim() == 4 else side
        if isinstance(row, Drop):
            x = F.dropout(x, row.probability, model.training)
        elif isinstance(row, Conv):
            weight, bias = next(parameters)
            assert weight.shape == (row.width or classes, x.shape[1], row.kernel, row.kernel)
            x = F.conv2d(x, weight, bias, stride=row.stride, padding=(row.kernel - 1) // 2)
            x = activation(x) if row.relu else x
        elif isinstance(row, Dense):
            weight, bias = next(parameters)
            x = F.linear(x.flatten(1), weight, bias)
            assert weight.shape[0] == (row.width or classes)
            x = activation(x) if row.relu else x
        else:
            x = F.max_pool2d(x, 2, 2) if row == POOL else x.mean((2, 3))
    assert next(parameters, None) is None
    return x, side


@pytest.mark.parametrize("name", TABLES)
def test_networks_have_the_sizes_of_their_tables(name: str):
    shape, side, parameters = SIZES[name]
    with torch.device("meta"):
        model = models.build(name)
        logits, last = as_tabulated(name, model, torch.empty(3, *shape), classes=1000 if "imagenet" in name else 10)
        assert model(torch.empty(3, *shape)).shape == logits.shape
    assert models.input_size(model, name) == shape
    assert (last, sum(p.numel() for p in model.parameters())) == (side, parameters)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)] == LAYERS[name]


@pytest.mark.parametrize(("name", "size"), list(zip(TABLES, (8, 9, 9, 19, 25), strict=True)))
@pytest.mark.parametrize(("activation", "function"), [({}, F.relu), ({"activation": "tanh"}, torch.tanh)], ids=["relu", "tanh"])
def test_networks_compute_what_their_tables_say(
    name: str, size: int, activation: dict[str, str], function: Callable[[Tensor], Tensor]
):
    torch.manual_seed(0)
    model = models.build(name, image_size=size, classes=3, in_channels=2, **activation).double()
    x = torch.randn(2, 2, size, size, dtype=torch.float64)
    for mode in (model.eval(), model.train()):
        torch.manual_seed(1)
        given = mode(x)
        torch.manual_seed(1)
        expected, _ = as_tabulated(name, mode, x, 3, function)
        torch.testing.assert_close(given, expected)
    if any(isinstance(row, Drop) for row in TABLES[name]):
        assert not torch.allclose(model.train()(x), model.eval()(x)), "control: dropout has no effect"


@pytest.mark.parametrize("name", TABLES)
def test_fan_in_initialisation_has_variance_one_over_n_in_and_zero_biases(name: str):
    torch.manual_seed(0)
    model = models.build(name, init="fan_in", image_size=32)
    for layer in LAYERS[name]:
        weight = model.get_parameter(f"{layer}.weight")
        n_in = weight.shape[1] * (weight.shape[2] * weight.shape[3] if weight.dim() == 4 else 1)
        # The standard error of a variance estimated from n normal numbers is sqrt(2/n) of it.
        assert abs(weight.var().item() * n_in - 1) < 5 * math.sqrt(2 / weight.numel()), layer
        assert not model.get_parameter(f"{layer}.bias").any()


@pytest.mark.parametrize(("option", "message"), [("init", "'fan_in' or 'default'"), ("activation", "'relu' or 'tanh'")])
def test_unknown_choices_are_refused(option: str, message: str):
    with pytest.raises(InputError, match=rf"{option} must be {message}.* \(got 'elu'\)"):
        models.build("paper/mnist", **{option: "elu"})


def test_default_initialisation_is_torchs():
    torch.manual_seed(0)
    model = models.build("paper/mnist", init="default")
    torch.manual_seed(0)
    assert torch.equal(model.get_parameter("conv1.weight"), nn.Conv2d(1, 32, 5).weight)


@pytest.mark.parametrize(("size", "channels", "classes"), [(8, 1, 10), (32, 3, 7), (30, 2, 2)])
@pytest.mark.parametrize("name", [name for name in TABLES if name != "paper/imagenet-1"])
def test_networks_fit_other_images(name: str, size: int, channels: int, classes: int):
    with torch.device("meta"):
        model = models.build_for_images(name, (channels, size, size), classes)
        assert model(torch.empty(1, channels, size, size)).shape == (1, classes)
    assert models.input_size(model, name) == (channels, size, size)


@pytest.mark.parametrize(
    ("name", "least"), [("mnist", 4), ("cifar10-1", 4), ("cifar10-2", 1), ("imagenet-1", 11), ("imagenet-2", 1)]
)
def test_images_too_small_for_the_poolings_are_refused(name: str, least: int):
    with torch.device("meta"):
        smallest = models.build(f"paper/{name}", image_size=least)
        smallest(torch.empty(1, *models.input_size(smallest, f"paper/{name}")))
    with pytest.raises(InputError, match=f"paper/{name} needs .* at least {least}x{least} .*image_size={least - 1}"):
        models.build(f"paper/{name}", image_size=least - 1)
