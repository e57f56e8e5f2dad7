"""The half of the speed that can be asserted anywhere: what a step computes and keeps. And that the benchmark measures it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fahooks
from fahooks import benchmark, models
from fahooks.plugins import InputError
from fahooks.rules import FeedbackAlignment
from fahooks.surgery import feedback_rules

HEAVY = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
"""Operations whose cost is that of the layers."""

SAME_WORK = ("sham", "fa", "usf", "usf_init", "usf_sn", "frsf", "brsf", "bp_noise", "kp", "wm")
"""Rules whose forward and backward pass do the heavy operations of backpropagation."""

NETWORKS = ("timm/test_byobnet", "timm/test_vit", "paper/cifar10-1")


class Counted(TorchDispatchMode):
    """Counts the heavy operations that torch carries out; of convolutions' gradients only those that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            self.calls.update(
                f"gradient of a convolution's {what}" for what, need in zip(("x", "W", "b"), args[-1], strict=True) if need
            )
        elif name in HEAVY:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build_for_images(name, (3, 32, 32), 10).train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)


def second_step(model: nn.Module) -> Counter[str]:
    """The heavy operations of a forward and a backward pass, once matrices are drawn."""
    images, labels = batch()
    steps = Counted(), Counted()
    for counted in steps:
        with counted, fahooks.targets(model, labels):
            F.cross_entropy(model(images), labels).backward()
    return steps[1].calls


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", SAME_WORK)
def test_a_step_does_the_work_of_backpropagation(name: str, rule: str):
    plain, converted = make(name), make(name)
    fahooks.convert(converted, rule)
    expected = second_step(plain)
    assert sum(expected.values()) > 10
    assert second_step(converted) == expected


def test_the_count_sees_work_that_is_added():
    plain, converted = make("paper/cifar10-1"), make("paper/cifar10-1")
    fahooks.convert(converted, lambda weight: weight @ torch.eye(weight.shape[-1]))
    assert second_step(converted)["mm"] > second_step(plain)["mm"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_direct_rules_compute_no_input_gradient_of_a_convolution(name: str, rule: str):
    plain, converted = make(name), make(name)
    fahooks.convert(converted, rule, feedback="channel")
    expected, found = second_step(plain), second_step(converted)
    assert found["gradient of a convolution's x"] == 0
    if name != "timm/test_vit":
        assert expected["gradient of a convolution's x"] > 0, "control"
    assert found["gradient of a convolution's W"] == expected["gradient of a convolution's W"]
    # One product an input in place of an input gradient: for each convolution one more than before.
    layers = len(feedback_rules(converted))
    assert sum(found[name] for name in ("mm", "bmm")) <= sum(expected[name] for name in ("mm", "bmm")) + layers


@pytest.mark.parametrize("rule", ["sham", "usf", "usf_sn", "bp_noise"])
def test_rules_without_state_add_none(rule: str):
    model = make("paper/cifar10-1")
    before = {name: value.shape for name, value in model.state_dict().items()}
    fahooks.convert(model, rule)
    second_step(model)
    assert {name: value.shape for name, value in model.state_dict().items() if value.numel() > 1} == before
    assert not any(rule.memory_bytes for rule in feedback_rules(model).values())


def test_feedback_alignment_adds_one_copy_of_the_weights():
    model = make("paper/cifar10-1")
    report = fahooks.convert(model, "fa")
    assert report.memory_bytes == sum(4 * p.numel() for p in model.parameters() if p.dim() > 1)


def test_seeded_feedback_keeps_nothing():
    for name in ("dfa", "dense_fa"):
        model = make("paper/cifar10-1")
        fahooks.convert(model, name, feedback="seeded")
        second_step(model)
        kept = sum(rule.memory_bytes for rule in feedback_rules(model).values())
        own = 0 if name == "dfa" else sum(4 * p.numel() for p in model.parameters() if p.dim() > 1)
        assert kept == own, "dense_fa keeps its B, as fa does, and nothing for the residual connections"


def contestants(**options: Any) -> dict[str, benchmark.Timing]:
    images, labels = batch()
    rules = {"fa": "fa", "large": {"*": {"rule": Large}}, "learning": "kp", "targeted": "drtp"}
    timings = benchmark.compare(lambda: make("timm/test_byobnet"), rules, images, labels, rounds=3, **options)
    assert [timing.name for timing in timings] == ["backprop", "backprop again", *rules]
    return {timing.name: timing for timing in timings}


class Large(FeedbackAlignment):
    """Feedback alignment that takes 64 MiB for a moment, and time."""

    def forward(self, weight: Tensor) -> Tensor:
        torch.ones(2**24).sum()
        return super().forward(weight)


def test_the_benchmark_sees_time_memory_and_state():
    found = contestants()
    assert found["backprop"].ratios["cpu"] == benchmark.Ratio(1, 1, 1)
    assert found["backprop"].state_bytes == found["backprop again"].state_bytes == 0
    assert found["fa"].state_bytes > 100_000
    assert found["targeted"].state_bytes > 1000, "direct rules keep what they draw, once they have"
    assert found["large"].peak_bytes > found["fa"].peak_bytes + 2**25
    assert found["large"].milliseconds["cpu"] > found["fa"].milliseconds["cpu"]
    assert all(
        timing.ratios["wall"].low <= timing.ratios["wall"].median <= timing.ratios["wall"].high for timing in found.values()
    )


def test_all_contestants_train_the_same_weights(monkeypatch: pytest.MonkeyPatch):
    made: list[nn.Module] = []
    optimizers: list[torch.optim.SGD] = []

    def optimizer(*args: Any, **options: Any) -> torch.optim.SGD:
        optimizers.append(torch.optim.SGD(*args, **options))
        return optimizers[-1]

    def once_more() -> nn.Module:
        made.append(make("timm/test_byobnet"))
        return made[-1]

    monkeypatch.setattr(benchmark, "SGD", optimizer)
    images, labels = batch()
    before = once_more().state_dict()
    benchmark.compare(once_more, {"fa": "fa", "kp": "kp"}, images, labels, rounds=1)
    _, first, *others = made
    assert len(others) == 4
    assert any(not torch.equal(value, before[name]) for name, value in first.named_parameters()), "control: they train"
    for other in others:
        assert all(other.get_parameter(name) is value for name, value in first.named_parameters())
        assert all(other.get_buffer(name) is value for name, value in first.named_buffers())
    assert len(optimizers) == 4 and optimizers[0].state, "momenta"
    assert all(other.state is optimizers[0].state for other in optimizers)


def test_the_benchmark_runs_in_bfloat16():
    assert set(contestants(bf16=True)["fa"].milliseconds) == {"cpu", "wall"}


def test_the_benchmark_needs_a_round():
    images, labels = batch()
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        benchmark.compare(lambda: make("timm/test_byobnet"), {}, images, labels, rounds=0)
