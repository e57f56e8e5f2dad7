from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.probes import degrees


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    (net(x) ** 2).sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return {"input": x.grad.clone(), **found} if x.grad is not None else found


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(400, 50).double(), torch.randn(64, 400).double()),
        "conv": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2).double(), torch.randn(16, 4, 24, 24).double()),
    }


def test_noise_has_mean_zero_and_the_variance_of_the_signal():
    for layer, x in layers().values():
        true = gradients(layer, x)
        fahooks.convert(layer, "bp_noise")
        noisy = gradients(layer, x)
        noise = noisy["input"] - true["input"]
        count, variance = noise.numel(), true["input"].var().item()
        assert abs(noise.mean().item()) < 5 * (variance / count) ** 0.5
        assert abs(noise.var().item() / variance - 1) < 5 * (2 / count) ** 0.5
        assert 43 < degrees(noisy["input"], true["input"]) < 47
        assert all(torch.equal(noisy[name], true[name]) for name in true if name != "input"), "the layer's own gradients are true"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(5, 4), (5,)),
        (lambda: nn.Linear(5, 4, bias=False), (2, 3, 2, 5)),
        (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 7)),
        (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), (1, 2, 2, 3, 2)),
    ],
)
def test_of_any_layer_the_error_is_the_true_one_and_the_noise(make: Callable[[], nn.Module], shape: tuple[int, ...]):
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape).double()
    true = gradients(layer, x)
    fahooks.convert(layer, "bp_noise", scale=0.5)
    torch.manual_seed(3)
    noisy = gradients(layer, x)
    torch.manual_seed(3)
    noise = 0.5 * true["input"].std(correction=0) * torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(noisy, true | {"input": true["input"] + noise})
    assert noise.norm() > 0.1 * true["input"].norm(), "control: there is noise"


def test_scale_is_a_factor_on_the_deviation():
    layer, x = layers()["linear"]
    true = gradients(layer, x)["input"]
    fahooks.convert(layer, "bp_noise", scale=3.0)
    assert abs((gradients(layer, x)["input"] - true).std().item() / true.std().item() / 3 - 1) < 0.05


def test_noise_comes_from_the_global_generator():
    layer, x = layers()["linear"]
    fahooks.convert(layer, "bp_noise")
    torch.manual_seed(3)
    first, second = gradients(layer, x)["input"], gradients(layer, x)["input"]
    torch.manual_seed(3)
    assert torch.equal(gradients(layer, x)["input"], first)
    assert not torch.equal(first, second)


def test_noise_adds_up_from_layer_to_layer():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(100, 100) for _ in range(4))).double()
    x = torch.randn(32, 100).double()
    true = gradients(copy.deepcopy(net), x)
    fahooks.convert(net, "bp_noise")
    noisy = gradients(net, x)
    angles = [degrees(noisy[f"{layer}.weight"], true[f"{layer}.weight"]) for layer in (3, 2, 1, 0)]
    assert angles[0] == 0 and angles == sorted(angles)


def test_small_errors_in_half_precision_have_their_noise():
    layer, x = layers()["linear"]
    layer, x = layer.half(), x.half().requires_grad_()
    error = (torch.randn(64, 50, generator=torch.Generator().manual_seed(2)) * 1e-4).half()
    fahooks.convert(layer, "bp_noise")
    (noisy,) = torch.autograd.grad(layer(x), x, error)
    with fahooks.backprop(layer):
        (true,) = torch.autograd.grad(layer(x), x, error)
    assert true.float().var().half() == 0, "control: the variance of the signal is below what the dtype holds"
    assert 0.9 < (noisy.float() - true.float()).std() / true.float().std() < 1.1
