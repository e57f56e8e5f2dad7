from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fahooks
from fahooks.plugins import InputError
from fahooks.probes import Probe, degrees, probe
from fahooks.surgery import feedback_layers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(features: int = 6, classes: int = 3, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, features, generator=generator), torch.randint(0, classes, (count,), generator=generator)


def measured(model: nn.Module, x: Tensor, y: Tensor) -> Probe:
    with probe(model) as p:
        p.measure(lambda: F.cross_entropy(model(x), y))
    return p


@pytest.mark.parametrize("rule", ["bp", "sham"])
def test_backprop_has_angle_zero_everywhere(rule: str):
    model = network()
    fahooks.convert(model, rule)
    p = measured(model, *batch())
    assert p.angle == p.weight_angle == {"0": 0.0, "3": 0.0, "5": 0.0}
    assert p.norm_ratio == {"0": 1.0, "3": 1.0, "5": 1.0}


def test_an_unconverted_model_can_be_probed():
    assert measured(network(), *batch()).angle == {"0": 0.0, "3": 0.0, "5": 0.0}


def test_a_random_feedback_matrix_is_orthogonal_at_first_and_a_sign_symmetric_one_is_not():
    """Lillicrap et al. 2016: about 90 degrees at initialisation. In d dimensions the deviation is about 57/sqrt(d) degrees."""
    angles = {}
    for rule in ("fa", "usf_sn"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 2000), nn.Tanh(), nn.Linear(2000, 500), nn.Tanh(), nn.Linear(500, 100))
        fahooks.convert(model, rule)
        angles[rule] = measured(model, *batch(20, 100, 200)).angle
    assert abs(angles["fa"]["0"] - 90) < 4 and abs(angles["fa"]["2"] - 90) < 4
    # torch draws W uniformly: the cosine of W and sign(W) is then the square root of 3/4, 30 degrees.
    assert abs(angles["usf_sn"]["2"] - 30) < 4
    assert angles["fa"]["4"] == angles["usf_sn"]["4"] == 0


def test_angles_and_ratios_are_those_computed_by_hand():
    model = network().double().eval()
    fahooks.convert(model, "fa")
    x, y = batch()
    x = x.double()
    p = measured(model, x, y)

    layers: list[Any] = [model[i] for i in (0, 3, 5)]
    first, second, third = layers
    u1 = first(x).detach()
    u2 = second(u1.relu()).detach()
    u3 = third(u2.tanh()).detach()
    delta3 = (u3.softmax(1) - F.one_hot(y, 3)) / len(y)

    def below(third_matrix: Tensor, second_matrix: Tensor) -> tuple[Tensor, Tensor]:
        delta2 = delta3 @ third_matrix * (1 - u2.tanh() ** 2)
        return delta2 @ second_matrix * (u1 > 0), delta2

    true = below(third.weight.detach(), second.weight.detach())
    sent = below(third.feedback.matrix, second.feedback.matrix)
    inputs = x, u1.relu()
    for name, signal, gradient, value in zip(("0", "3"), sent, true, inputs, strict=True):
        cosine = (signal * gradient).sum() / (signal.norm() * gradient.norm())
        assert p.angle[name] == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-9)
        assert p.norm_ratio[name] == pytest.approx((signal.norm() / gradient.norm()).item(), rel=1e-12)
        a, b = signal.T @ value, gradient.T @ value
        assert p.weight_angle[name] == pytest.approx(math.degrees(math.acos((a * b).sum() / (a.norm() * b.norm()))), abs=1e-9)
        assert p.angle[name] > 5
    assert p.angle["5"] == 0


def test_a_layer_that_is_called_twice_counts_both_calls():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3)).double()
    fahooks.convert(model, "fa")
    x, y = batch(4)
    p = measured(model, x.double(), y)

    def signals() -> Tensor:
        u1 = shared(x.double())
        u2 = shared(u1.tanh())
        loss = F.cross_entropy(model[4](u2.tanh()), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (u2, u1))])

    sent = signals()
    with fahooks.backprop(model):
        true = signals()
    assert p.angle["0"] == pytest.approx(degrees(sent, true), abs=1e-9)
    assert p.angle["0"] > 5


def test_sign_flips_accumulate_from_the_start_of_the_probe():
    model = network()
    x, y = batch()
    first, last = (model.get_parameter(f"{name}.weight") for name in ("0", "5"))
    with probe(model) as p:
        p.measure(lambda: F.cross_entropy(model(x), y))
        assert set(p.sign_flips.values()) == {0.0}
        with torch.no_grad():
            first[:2].neg_()
            last.mul_(3)
        p.measure(lambda: F.cross_entropy(model(x), y))
        assert p.sign_flips == {"0": 0.4, "3": 0.0, "5": 0.0}
        with torch.no_grad():
            first[:2].neg_()
        p.measure(lambda: F.cross_entropy(model(x), y))
        assert p.sign_flips["0"] == 0


def test_measuring_leaves_gradients_random_numbers_and_buffers_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3))
    fahooks.convert(model, "fa")
    x = torch.randn(8, 1, 4, 4)
    y = batch()[1]
    F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    p = measured(model, x, y)
    assert p.angle["0"] > 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(torch.equal(now[name], g) for name, g in gradients.items())
    assert not any(layer._forward_hooks for layer in model.modules())
    with fahooks.backprop(model):
        pass
    assert all(layer.feedback_enabled for layer in feedback_layers(model).values())


def test_a_loss_that_raises_leaves_no_trace():
    model = network()
    generator = torch.get_rng_state()
    with probe(model) as p, pytest.raises(ZeroDivisionError):
        p.measure(lambda: model(batch()[0]) / (1 // 0))
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_dropout_is_the_same_with_rules_on_and_off():
    """With different masks even backprop would be at an angle to itself."""
    model = network().train()
    x, y = batch()
    p = measured(model, x, y)
    assert p.angle["0"] == 0
    losses = [F.cross_entropy(model(x), y) for _ in range(2)]
    first, second = (torch.autograd.grad(loss, model.get_parameter("0.weight"))[0] for loss in losses)
    assert degrees(first, second) > 0


def test_parametrized_weights_keep_their_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))
    fahooks.convert(model, "fa")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    p = measured(model, *batch())
    assert set(p.angle) == {"0", "2"} and p.sign_flips["0"] == 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_attention_is_probed_at_its_output():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    fahooks.convert(encoder, "fa")
    x = torch.randn(2, 5, 8)
    with probe(encoder) as p:
        p.measure(lambda: encoder(x).square().sum())
    assert {"self_attn", "linear1", "linear2"} <= set(p.angle)
    assert p.angle["self_attn"] > 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.0], [0.0, 2.0], 90.0),
        ([1.0, 0.0], [-3.0, 0.0], 180.0),
        ([1.0, 1.0], [1.0, 0.0], 45.0),
        ([1.0, 0.0], [1.0, 1e-9], math.degrees(1e-9)),
        ([0.1, 0.2], [0.1, 0.2], 0.0),
    ],
)
def test_degrees(a: list[float], b: list[float], expected: float):
    assert degrees(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)) == pytest.approx(
        expected, rel=1e-9
    )


def test_no_signal_has_no_angle():
    assert math.isnan(degrees(torch.zeros(3), torch.ones(3)))
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100)
    p = measured(model, *batch())
    assert math.isnan(p.angle["0"]) and math.isnan(p.norm_ratio["0"]) and p.angle["2"] == 0


def test_what_can_not_be_probed_is_refused():
    with pytest.raises(InputError, match="no linear or convolution layer"), probe(nn.ReLU()):
        pass
    model = network()
    with probe(model) as p:
        with pytest.raises(InputError, match=r"got shape \(8, 3\)"):
            p.measure(lambda: model(batch()[0]))
        with pytest.raises(InputError, match="requires_grad=False"):
            p.measure(lambda: model(batch()[0]).sum().detach())
