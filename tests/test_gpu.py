"""The core on a GPU: what a GPU does otherwise than a CPU. Skipped where torch finds none."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fahooks
from fahooks import models, verify
from fahooks.reference import oracle
from fahooks.rules.direct_matrix import DirectMatrix
from fahooks.surgery import feedback_rules
from tests.zoo import exactness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")

Learn = Callable[..., Any]

FIXED_RULES = ("fa", "usf", "usf_init", "usf_sn", "frsf")
MATRIX_RULES = (*FIXED_RULES, "brsf", "kp", "wm")
DIRECT_RULES = ("dfa", "dense_fa", "drtp")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Transposed convolutions of cuDNN give other bits each time."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def network() -> nn.Sequential:
    """Every kind of layer, strided, dilated and grouped."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=4),
        nn.Tanh(),
        nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1),
        nn.Flatten(),
        nn.Linear(6 * 18 * 18, 16, bias=False),
        nn.Tanh(),
        nn.Linear(16, 10),
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def labels(count: int = 4) -> Tensor:
    return torch.randint(10, (count,), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor, **autocast: Any) -> dict[str, Tensor]:
    """Of cross-entropy, on the CPU and in float64."""
    target = labels(len(x)).to(x.device)
    model.zero_grad()
    with torch.autocast("cuda", **(autocast or {"enabled": False})), fahooks.targets(model, target):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    return {name: p.grad.detach().cpu().double() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(((found[name] - g).norm() / g.norm()).item() for name, g in expected.items())


@pytest.mark.parametrize("rule", [*FIXED_RULES, "brsf"])
def test_gradients_are_those_of_the_oracle(rule: str, learn: Learn):
    plain = network().double().cuda()
    converted, surrogate = copy.deepcopy(plain), copy.deepcopy(plain)
    fahooks.convert(converted, rule)
    rules = feedback_rules(copy.deepcopy(converted))  # brsf draws in each pass: theirs are as far
    x = images().double().cuda()
    expected = learn(surrogate, x, around=lambda: oracle(surrogate, rules))
    learn(converted, x).assert_oracle(expected, learn(plain, x), tolerance=1e-9)


@pytest.mark.parametrize("rule", [*FIXED_RULES, "kp", "wm", *DIRECT_RULES])
def test_a_seed_means_the_same_on_every_device(rule: str):
    """And it is one whether a model is converted before or after it is moved."""
    here, there, moved = (network().double() for _ in range(3))
    fahooks.convert(here, rule)
    fahooks.convert(moved, rule)
    fahooks.convert(there.cuda(), rule)
    x = images().double()
    expected = gradients(here, x)
    assert distance(gradients(there, x.cuda()), expected) < 1e-9
    assert distance(gradients(moved.cuda(), x.cuda()), expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rule", [*MATRIX_RULES, *DIRECT_RULES])
def test_autocast_gives_the_gradients_of_float32_but_for_rounding(rule: str, dtype: torch.dtype):
    plain = network().cuda()
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule)
    x = images(32).cuda()
    reduced = copy.deepcopy(converted)
    exact = gradients(converted, x)
    found = gradients(reduced, x, dtype=dtype)
    rounding = distance(gradients(copy.deepcopy(plain), x, dtype=dtype), gradients(copy.deepcopy(plain), x))
    assert distance(found, exact) < max(0.05, 4 * rounding)
    assert distance(exact, gradients(plain, x)) > 0.2, "control: the gradients are those of backpropagation"


@pytest.mark.parametrize("classes", [8, 10, 13])
@pytest.mark.parametrize("feedback", ["dense", "channel", "seeded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_direct_signals_are_b_e_whatever_the_alignment(dtype: torch.dtype, feedback: str, classes: int):
    drawn = {"init": "fan_out", "distribution": "normal", "gain": 1.0}
    matrix = DirectMatrix(0, feedback=feedback, **drawn)
    error = torch.randn(5, classes, 1, device="cuda", dtype=dtype)
    shape = torch.Size((5, 3, 7))
    signal = matrix(error, shape)
    exact = DirectMatrix(0, feedback=feedback, **drawn)(error.double(), shape)
    assert signal.dtype == dtype
    torch.testing.assert_close(signal.double(), exact, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2)


@pytest.mark.parametrize("rule", ["fa", "usf_sn", "dfa"])
def test_channels_last_changes_nothing(rule: str):
    plain = network().double().cuda()
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule)
    x = images().double().cuda()
    last = copy.deepcopy(converted).to(memory_format=torch.channels_last)
    assert distance(gradients(last, x.to(memory_format=torch.channels_last)), gradients(converted, x)) < 1e-9


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("rule", ["fa", "usf", "usf_init", "usf_sn", "dfa"])
def test_inductor_gives_the_gradients_of_eager(rule: str):
    torch.compiler.reset()
    converted = network().cuda()
    fahooks.convert(converted, rule)
    x = images().cuda()
    eager = gradients(converted, x)
    compiled: Any = torch.compile(converted, fullgraph=True)
    with fahooks.targets(converted, labels().cuda()):
        converted.zero_grad()
        F.cross_entropy(compiled(x), labels().cuda()).backward()
    found = {name: p.grad.cpu().double() for name, p in converted.named_parameters() if p.grad is not None}
    assert distance(found, eager) < 1e-3


@pytest.mark.parametrize("rule", ["fa", "usf_sn", "usf_init"])
def test_a_step_is_captured_as_a_cuda_graph(rule: str):
    """No rule waits for the device, nor writes to memory that somebody else has when the graph is replayed."""
    model = network().cuda()
    fahooks.convert(model, rule)
    x, target = images().cuda(), labels().cuda()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), target).backward()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    other = images().flip(0).cuda()
    x.copy_(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    torch.randn(2**22, device="cuda").sum()
    graph.replay()
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    assert distance(found, gradients(model, x)) < 1e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("rule", [*MATRIX_RULES, "dfa"])
def test_no_step_waits_for_the_gpu(rule: str):
    model = network().cuda()
    fahooks.convert(model, rule)
    x, target = images().cuda(), labels().cuda()
    for mode in ("default", "error"):  # matrices are drawn in the first pass
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with fahooks.targets(model, target):
                F.cross_entropy(model(x), target).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_sign_rules_keep_nothing_and_hold_one_matrix_at_a_time():
    """Eight layers of 4 MiB."""

    def peak(rule: str | None) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).cuda()
        gc.collect()
        if rule is not None:
            before = torch.cuda.memory_allocated()
            fahooks.convert(model, rule)
            assert torch.cuda.memory_allocated() == before
        x = torch.randn(8, 1024, device="cuda", requires_grad=True)
        for _ in range(2):
            model.zero_grad(set_to_none=False)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    plain, matrix = peak(None), 4 * 1024**2
    for rule in ("usf", "usf_sn"):
        assert peak(rule) <= plain + 2 * matrix  # B, and a matrix of the size of B in between


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/test_vit", "timm/test_convnext", "timm/test_byobnet", "paper/cifar10-2"])
def test_models_pass_what_the_zoo_asks(name: str):
    torch.manual_seed(0)
    model = models.build_for_images(name, (3, 32, 32), 10)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert exactness.check(model.double().cuda(), [x.cuda()]) > 4


@pytest.mark.parametrize("rule", ["fa", "usf_sn", "dfa"])
def test_verify_agrees(rule: str):
    model = models.build_for_images("timm/resnet18", (3, 32, 32), 10).cuda()
    x = torch.randn(4, 3, 32, 32, device="cuda")
    plain = verify.outputs(model, x)
    report = fahooks.convert(model, rule)
    found = verify.verify(model, plain, x, ignore=report.left_out)
    assert found.ok, str(found)
