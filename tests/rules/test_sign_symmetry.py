from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import SignSymmetry, SignSymmetryInit, SignSymmetryNormalized, SignSymmetryRandomMagnitude
from fahooks.surgery import feedback_rules

N_OUT = 6 * 2 * 3


def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 12, (2, 3), groups=2).double()


def drawn(**options: Any) -> Tensor:
    """B_0, as `fa` draws it for the same layer."""
    layer = conv()
    fahooks.convert(layer, "fa", **options)
    return feedback_rules(layer)[""].get_buffer("matrix")


def equation_5(weight: Tensor) -> Tensor:
    """Eq. 5 in float64."""
    weight = weight.double()
    return weight.square().sum().sqrt() * weight.sign() / max(1, int((weight != 0).sum())) ** 0.5


# Rule, options, and the feedback matrix that it is to send for a weight.
RULES: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("usf", {}, lambda weight: weight.sign() / N_OUT**0.5),
    ("usf", {"scale": 1}, torch.sign),
    ("usf", {"scale": 0.25}, lambda weight: weight.sign() / 4),
    ("usf_init", {}, lambda weight: drawn().abs() * weight.sign()),
    ("usf_init", {"gain": 2.0}, lambda weight: 2 * drawn().abs() * weight.sign()),
    ("frsf", {}, lambda weight: drawn(distribution="uniform").abs() * weight.sign()),
    ("frsf", {"init": "fan_in"}, lambda weight: drawn(distribution="uniform", init="fan_in").abs() * weight.sign()),
    ("usf_sn", {}, equation_5),
]

each_rule = pytest.mark.parametrize(("rule", "options", "feedback"), RULES, ids=[f"{name} {o or ''}" for name, o, _ in RULES])


def sent(layer: nn.Conv2d, delta: Tensor, input_size: tuple[int, ...]) -> Tensor:
    x = torch.randn(input_size).double().requires_grad_()
    return torch.autograd.grad(layer(x), x, delta)[0]


@each_rule
def test_feedback_follows_the_signs_of_the_live_weight(
    rule: str, options: dict[str, Any], feedback: Callable[[Tensor], Tensor]
) -> None:
    layer, size = conv(), (2, 4, 5, 5)
    fahooks.convert(layer, rule, **options)
    delta = torch.randn(2, 12, 4, 3).double()
    first = feedback(layer.weight.detach())
    torch.testing.assert_close(sent(layer, delta, size), conv2d_input(size, first, delta, groups=2))
    assert not torch.allclose(sent(layer, delta, size), conv2d_input(size, layer.weight, delta, groups=2)), "control: B is W"

    layer.weight.grad = layer.weight.detach() + torch.randn_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=1).step()
    second = feedback(layer.weight.detach())
    assert not torch.equal(first.sign(), second.sign())
    torch.testing.assert_close(sent(layer, delta, size), conv2d_input(size, second, delta, groups=2))


@each_rule
def test_a_zero_weight_sends_no_error(rule: str, options: dict[str, Any], feedback: Callable[[Tensor], Tensor]) -> None:
    layer = conv()
    fahooks.convert(layer, rule, **options)
    served = feedback_rules(layer)[""]
    weight = layer.weight.detach().clone()
    weight[0] = 0
    matrix = served(weight)
    assert not matrix[0].any() and matrix[1:].all()
    torch.testing.assert_close(matrix, feedback(weight))
    assert not served(torch.zeros_like(weight)).any()


@pytest.mark.parametrize("rule", ["usf", "usf_sn"])
def test_half_precision_does_not_overflow(rule: str) -> None:
    layer = nn.Linear(512, 512, bias=False, dtype=torch.float16)
    fahooks.convert(layer, rule)
    x = torch.ones(1, 512, dtype=torch.float16, requires_grad=True)
    delta = layer.weight.detach()[:, :1].sign().t() * 200
    assert (delta @ layer.weight.detach().sign()).isinf().any(), "control: without the factor it does"
    (gradient,) = torch.autograd.grad(layer(x), x, delta)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("layer", [nn.Linear(8, 8, bias=False), nn.Conv1d(8, 8, 1, bias=False)], ids=["linear", "convolution"])
def test_a_forward_that_is_overridden_or_hooked_is_not_bypassed(layer: nn.Module) -> None:
    class Halved(SignSymmetry):
        """Half the matrix of its base."""

        def forward(self, weight: Tensor) -> Tensor:
            return super().forward(weight) / 2

    def received(rule: Any, hook: Any = None) -> Tensor:
        converted = copy.deepcopy(layer)
        nn.init.constant_(converted.get_parameter("weight"), 0.5)
        fahooks.convert(converted, rule)
        if hook is not None:
            feedback_rules(converted)[""].register_forward_hook(hook)
        x = torch.ones((1, 8) if isinstance(layer, nn.Linear) else (1, 8, 1), requires_grad=True)
        return torch.autograd.grad(converted(x).sum(), x)[0]

    whole = received(SignSymmetry)
    torch.testing.assert_close(whole, torch.full_like(whole, 8**0.5))
    torch.testing.assert_close(received(Halved), whole / 2)
    torch.testing.assert_close(received(SignSymmetry, lambda rule, args, matrix: 3 * matrix), 3 * whole)


def test_norms_of_many_weights_keep_their_digits() -> None:
    weight = 0.02 * torch.randn(512, 512, 3, 3)
    weight[0] = 0
    rule = SignSymmetryNormalized()
    single, exact = rule(weight), rule(weight.double())
    assert abs(single.abs().max() / exact.abs().max() - 1) < 1e-6
    assert abs(torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(weight.double()) - 1) > 1e-6, "control: in one go"


class Tagged(Tensor):
    """A tensor that is none of torch's own, as those of other devices takes the way that reads no number."""


@pytest.mark.parametrize("kind", [Tensor, Tagged])
@pytest.mark.parametrize("zeros", ["none", "one", "half", "all"])
@pytest.mark.parametrize("rows", [1, 128, 511, 512])
def test_strict_normalization_counts_the_zeros_of_small_and_large_weights(rows: int, zeros: str, kind: type[Tensor]) -> None:
    weight = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows))
    weight.view(-1)[: {"none": 0, "one": 1, "half": rows * 512, "all": rows * 1024}[zeros]] = 0
    matrix = SignSymmetryNormalized()(weight.as_subclass(kind)).as_subclass(Tensor)
    torch.testing.assert_close(matrix.double(), equation_5(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Tensor, Tagged])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 300, 600])
def test_strict_normalization_in_half_precision_rounds_once(rows: int, dtype: torch.dtype, kind: type[Tensor]) -> None:
    weight = torch.randn(rows, 1021, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight[0, 0] = 0
    matrix = SignSymmetryNormalized()(weight.as_subclass(kind)).as_subclass(Tensor)
    assert torch.equal(matrix, equation_5(weight).to(dtype))


@pytest.mark.parametrize("rows", [1, 512])
def test_strict_normalization_is_no_part_of_a_graph(rows: int) -> None:
    weight = torch.randn(rows, 1024, requires_grad=True)
    assert not SignSymmetryNormalized()(weight).requires_grad


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("spoilt", [1, 1024])
def test_strict_normalization_hides_no_fault_of_the_weights(rows: int, spoilt: int) -> None:
    weight = torch.ones(rows, 1024)
    weight[:, :spoilt] = float("nan")
    assert SignSymmetryNormalized()(weight).isnan().all()


@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 3, 5), (0, 3)])
def test_strict_normalization_is_equation_5_for_any_shape(shape: tuple[int, ...]) -> None:
    weight, rule = torch.randn(shape, dtype=torch.float64), SignSymmetryNormalized()
    if weight.numel():
        weight.view(-1)[1] = 0
    torch.testing.assert_close(rule(weight), equation_5(weight), rtol=1e-14, atol=0)


def test_strict_normalization_keeps_the_norm_of_the_weight_at_every_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    fahooks.convert(net, "usf_sn")
    norms: list[tuple[float, float]] = []
    for rule in feedback_rules(net).values():
        rule.register_forward_hook(lambda _, weight, matrix: norms.append((weight[0].norm().item(), matrix.norm().item())))
    x, optimizer = torch.randn(5, 2, 5, 5).double(), torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (net(x.requires_grad_()) - 1).square().sum().backward()
        optimizer.step()
    assert len(norms) == 40
    assert [of_b for _, of_b in norms] == pytest.approx([of_w for of_w, _ in norms], rel=1e-12)
    assert abs(norms[-1][0] / norms[1][0] - 1) > 0.05, "control: the norm changes"
    weight = torch.randn(7, 5)
    assert not torch.isclose(SignSymmetry()(weight).norm(), weight.norm()), "control: it is not so of every sign rule"


def test_strict_normalization_does_not_overflow_in_half_precision() -> None:
    weight = torch.full((300, 300), 300.0, dtype=torch.float16)
    assert torch.equal(SignSymmetryNormalized()(weight), weight)
    assert weight.norm().isinf(), "control: the norm fits"


@pytest.mark.parametrize(
    ("scale", "problem"),
    [*((scale, f"a positive number, got {scale!r}") for scale in (0, -1, float("inf"))), ("1", "a number .got '1'")],
)
def test_a_scale_that_is_not_positive_is_refused(scale: Any, problem: str) -> None:
    with pytest.raises(InputError, match=f"scale must be {problem}"):
        fahooks.convert(nn.Linear(2, 2), "usf", scale=scale)


@pytest.mark.parametrize("rule", ["usf", "usf_sn"])
def test_sign_rules_hold_no_state(rule: str) -> None:
    layer = conv()
    keys = list(layer.state_dict())
    assert fahooks.convert(layer, rule).memory_bytes == 0
    assert list(layer.state_dict()) == keys


def test_initialised_magnitudes_are_state() -> None:
    layer = conv()
    assert fahooks.convert(layer, "usf_init").memory_bytes == layer.weight.numel() * 8
    assert torch.equal(layer.state_dict()["feedback.matrix"], drawn().abs())


def test_rules_print_their_options() -> None:
    layer = nn.Linear(2, 16)
    fahooks.convert(layer, "usf")
    assert "SignSymmetry(scale=0.25)" in repr(layer)
    assert (
        repr(SignSymmetryInit(init="glorot"))
        == "SignSymmetryInit(init='glorot', distribution='normal', gain=1.0, storage='matrix')"
    )
    assert repr(SignSymmetryNormalized()) == "SignSymmetryNormalized()"


def asked(rule: str, times: int, **options: Any) -> tuple[SignSymmetryRandomMagnitude, list[Tensor]]:
    """A rule with a large weight of mixed signs, and the B of some backward passes."""
    layer = nn.Linear(60, 50)
    fahooks.convert(layer, rule, **options)
    served: Any = feedback_rules(layer)[""]
    delta = torch.eye(50)
    matrices = []
    for _ in range(times):
        x = torch.randn(50, 60, requires_grad=True)
        matrices.append(torch.autograd.grad(layer(x), x, delta)[0])
        assert torch.equal(matrices[-1].sign(), layer.weight.sign())
    return served, matrices


def test_batchwise_magnitudes_are_drawn_at_every_backward_pass_and_fixed_ones_once() -> None:
    _, (first, second) = asked("brsf", 2)
    assert not torch.equal(first.abs(), second.abs())
    _, (first, second) = asked("frsf", 2)
    assert torch.equal(first.abs(), second.abs())


@pytest.mark.parametrize(
    ("options", "variance", "kurtosis"),
    [({}, 1 / 50, 1.8), ({"init": "fan_in"}, 1 / 60, 1.8), ({"distribution": "normal", "gain": 2.0}, 4 / 50, 3.0)],
    ids=["fan_out", "fan_in", "normal"],
)
@pytest.mark.parametrize("rule", ["brsf", "frsf"])
def test_random_magnitudes_have_the_variance_of_the_connections(
    rule: str, options: dict[str, Any], variance: float, kurtosis: float
) -> None:
    sample = asked(rule, 1, **options)[1][0].double()
    moments = sample.square().mean().item(), (sample**4).mean().item()
    assert abs(moments[0] / variance - 1) < 5 * ((kurtosis - 1) / sample.numel()) ** 0.5
    assert moments[1] / moments[0] ** 2 == pytest.approx(kurtosis, rel=0.1)


def test_batchwise_magnitudes_go_on_from_a_checkpoint_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    weight = torch.ones(4, 3)
    (source, _), (target, _), (fresh, _) = (asked("brsf", times) for times in (3, 0, 0))
    torch.set_rng_state(before)
    target.load_state_dict(source.state_dict(), strict=True)
    fourth, fifth = source(weight), source(weight)
    assert torch.equal(target(weight), fourth) and torch.equal(target(weight), fifth)
    assert not torch.equal(fresh(weight), fourth), "control: every draw is the same"
    assert torch.equal(torch.get_rng_state(), before)
    (other, _) = asked("brsf", 3, seed=1)
    assert not torch.equal(other(weight), fourth)


def test_batchwise_magnitudes_add_no_parameters_worth_to_a_checkpoint() -> None:
    layer = conv()
    assert fahooks.convert(layer, "brsf").memory_bytes == 0
    assert sum(value.numel() for key, value in layer.state_dict().items() if key.startswith("feedback")) == 1
    layer.load_state_dict(conv().state_dict(), strict=True)


def test_a_zero_weight_sends_no_error_batchwise_either() -> None:
    layer = conv()
    fahooks.convert(layer, "brsf")
    weight = layer.weight.detach().clone()
    weight[0] = 0
    matrix = feedback_rules(layer)[""](weight)
    assert not matrix[0].any() and matrix[1:].all()
    assert matrix.dtype == weight.dtype


@pytest.mark.parametrize("rule", ["brsf", "frsf"])
@pytest.mark.parametrize("options", [{"gain": 0}, {"init": "x"}, {"distribution": "x"}], ids=str)
def test_wrong_options_of_random_magnitudes_are_refused(rule: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        fahooks.convert(nn.Linear(2, 2), rule, **options)
