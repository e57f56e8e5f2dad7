from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import FeedbackAlignment
from fahooks.surgery import feedback_rules

# Layers with enough weights for statistics, and the input on which their connections are counted.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(60, 50), (60,)),
    "conv1d": (lambda: nn.Conv1d(20, 30, 5), (20, 9)),
    "conv1d, groups": (lambda: nn.Conv1d(40, 60, 3, groups=2), (40, 5)),
    "conv2d": (lambda: nn.Conv2d(12, 18, (3, 5), padding=(1, 2)), (12, 5, 9)),
    "conv2d, groups": (lambda: nn.Conv2d(32, 48, 3, groups=4, padding=1), (32, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(90, 180, 3, groups=90, padding=1), (90, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 3, padding=1), (8, 5, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(30, 20, 5), (30, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(12, 18, (3, 5)), (12, 5, 9)),
    "conv_transpose2d, groups": (lambda: nn.ConvTranspose2d(32, 48, 3, groups=4), (32, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(6, 8, 3), (6, 5, 5, 5)),
}

each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def matrix(layer: nn.Module, **options: Any) -> Tensor:
    fahooks.convert(layer, "fa", **options)
    return feedback_rules(layer)[""].get_buffer("matrix")


def connections(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """N_in and N_out of a unit far from the border, counted: with weights of one, a path to an output adds one to it."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    middle = tuple(size // 2 for size in shape[1:])
    one_input = torch.zeros(1, *shape)
    one_input[(0, 0, *middle)] = 1
    with torch.no_grad():
        background = layer(torch.zeros(1, *shape))
        paths_out = (layer(one_input) - background).sum()
        paths_in = (layer(torch.ones(1, *shape)) - background).max()
    return int(paths_in), int(paths_out)


def assert_moments(sample: Tensor, variance: float) -> None:
    """Mean 0 and the given variance, within five standard errors."""
    count = sample.numel()
    assert abs(sample.mean().item()) < 5 * (variance / count) ** 0.5
    assert abs(sample.var().item() / variance - 1) < 5 * (2 / count) ** 0.5


@each_layer
def test_variance_is_one_over_the_connections_counted_backward(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    inward, outward = connections(make(), shape)
    assert_moments(matrix(make()), 1 / outward)
    if inward != outward:
        with pytest.raises(AssertionError):
            assert_moments(matrix(make()), 1 / inward)


@each_layer
@pytest.mark.parametrize(
    ("init", "variance"),
    [("fan_in", lambda n_in, n_out: 1 / n_in), ("glorot", lambda n_in, n_out: 2 / (n_in + n_out))],
    ids=["fan_in", "glorot"],
)
def test_other_variances(
    make: Callable[[], nn.Module], shape: tuple[int, ...], init: str, variance: Callable[[int, int], float]
) -> None:
    assert_moments(matrix(make(), init=init), variance(*connections(make(), shape)))


@pytest.mark.parametrize(("distribution", "kurtosis"), [("normal", 3.0), ("uniform", 1.8)])
def test_distributions(distribution: str, kurtosis: float) -> None:
    sample = matrix(nn.Linear(200, 100), distribution=distribution)
    assert_moments(sample, 1 / 100)
    assert ((sample / sample.std()) ** 4).mean().item() == pytest.approx(kurtosis, rel=0.1)


def test_gain_scales_the_matrix() -> None:
    torch.testing.assert_close(matrix(nn.Linear(5, 4), gain=0.5), 0.5 * matrix(nn.Linear(5, 4)))


def test_the_error_is_sent_through_the_fixed_matrix() -> None:
    layer = nn.Linear(4, 3).double()
    fixed = matrix(layer).clone()
    delta, x = torch.randn(2, 3).double(), torch.randn(2, 4).double().requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(layer(x), x, delta)
        torch.testing.assert_close(gradient, delta @ fixed)
        assert not torch.allclose(gradient, delta @ layer.weight)
        nn.init.normal_(layer.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "fan_on"}, "init must be one of 'fan_out', 'fan_in', 'glorot', got 'fan_on' - did you mean 'fan_"),
        ({"distribution": "gauss"}, "distribution must be one of 'normal', 'uniform', got 'gauss'"),
        ({"storage": "disk"}, "storage must be one of 'matrix', 'seed', got 'disk'"),
        ({"gain": 0}, "gain must be a positive number, got 0"),
        ({"gain": "big"}, r"gain must be a number \(got 'big'\)"),
        ({"gain": float("nan")}, "gain must be a positive number, got nan"),
        ({"gian": 1}, "rule 'fa' has no option 'gian' - did you mean 'gain'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(InputError, match=message):
        fahooks.convert(layer, "fa", **options)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("rule", ["fa", "usf_init", "frsf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_seed_in_place_of_the_matrix_sends_the_same_and_keeps_nothing(rule: str, dtype: torch.dtype) -> None:
    gradients = {}
    for storage, seed in (("matrix", 0), ("seed", 0), ("seed", 1)):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 6, 3, groups=2).to(dtype)
        keys = list(layer.state_dict())
        report = fahooks.convert(layer, rule, storage=storage, seed=seed)
        assert (report.memory_bytes == 0, list(layer.state_dict()) == keys) == (storage == "seed",) * 2
        for served in (layer, layer, copy.deepcopy(layer)):
            x = torch.ones(2, 4, 5, 5, dtype=dtype, requires_grad=True)
            served(x).square().sum().backward()
            assert x.grad is not None
            first = gradients.setdefault((storage, seed), x.grad)
            assert torch.equal(first, x.grad), "another B in the next backward pass"
    assert torch.equal(gradients["matrix", 0], gradients["seed", 0])
    assert not torch.equal(gradients["seed", 1], gradients["seed", 0]), "control: every seed draws the same"


def test_a_seed_in_place_of_the_matrix_works_under_autocast() -> None:
    layer = nn.Linear(4, 3)
    fahooks.convert(layer, "fa", storage="seed")
    x = torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    expected = torch.ones(2, 3, dtype=torch.bfloat16) @ feedback_rules(layer)[""](layer.weight).bfloat16()
    torch.testing.assert_close(x.grad, expected.float())


@pytest.mark.parametrize("rule", ["kp", "wm"])
def test_a_matrix_that_learns_has_to_be_kept(rule: str) -> None:
    with pytest.raises(InputError, match=f"rule '{rule}' has no option 'storage'"):
        fahooks.convert(nn.Linear(2, 2), rule, storage="seed")


def test_prints_its_options() -> None:
    assert repr(FeedbackAlignment(gain=2)) == "FeedbackAlignment(init='fan_out', distribution='normal', gain=2, storage='matrix')"
