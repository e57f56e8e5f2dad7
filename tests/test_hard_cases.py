"""What people do to models besides training them: one test for each case that other libraries get wrong.

Those with a file of their own are elsewhere: weight norms, attention, compiling, autocast, checkpointing, processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fahooks
from fahooks.reference import oracle
from fahooks.surgery import ConversionError, feedback_rules

Learn = Callable[..., Any]

RULES = ["fa", "usf", "usf_init", "usf_sn"]


def network(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)


def images(*, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def converted(model: nn.Module, rule: Any = "usf_sn", **options: Any) -> Any:
    model = copy.deepcopy(model)
    fahooks.convert(model, rule, **options)
    return model


def assert_exact(learn: Learn, plain: nn.Module, found: nn.Module, *inputs: Any) -> None:
    """The converted model has the plain one's bits and the oracle's gradients."""
    surrogate = copy.deepcopy(plain)
    with oracle(surrogate, feedback_rules(found)):
        expected = learn(surrogate, *inputs)
    learn(found, *inputs).assert_oracle(expected, learn(plain, *inputs))


def pruned(model: nn.Sequential, rule: str | None = None) -> nn.Sequential:
    """The model with two layers pruned, and then converted; torch can not copy a pruned model."""
    torch.manual_seed(2)
    for layer in [model[0], model[3]]:
        prune.random_unstructured(layer, "weight", amount=0.4)
    if rule is not None:
        fahooks.convert(model, rule)
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_pruned(learn: Learn, when: str, rule: str) -> None:
    found = pruned(network(), rule) if when == "before" else pruned(converted(network(), rule))
    surrogate = pruned(network())
    with oracle(surrogate, feedback_rules(found)):
        expected = learn(surrogate, images())
    learn(found, images()).assert_oracle(expected, learn(pruned(network()), images()))
    for layer in [found[0], found[3]]:
        prune.remove(layer, "weight")
    plain = copy.deepcopy(found)
    fahooks.revert(plain)
    assert_exact(learn, plain, found, images())


def test_a_pruned_weight_sends_no_error_by_sign_symmetry() -> None:
    found: Any = pruned(network(), "usf_sn")
    rule: Any = found[3].feedback
    assert torch.equal(rule(found[3].weight) == 0, found[3].weight_mask == 0)
    assert 0 < (found[3].weight_mask == 0).sum()


@pytest.mark.parametrize("first", ["orthogonal", "convert"])
def test_orthogonal(learn: Learn, first: str) -> None:
    plain, found = network(), network()
    if first == "convert":
        fahooks.convert(found, "usf_init")
    for model in (plain, found):
        torch.manual_seed(3)
        parametrizations.orthogonal(model[3])
        parametrizations.orthogonal(model[5])
    if first == "orthogonal":
        fahooks.convert(found, "usf_init")
    assert_exact(learn, plain, found, images())
    parametrize.remove_parametrizations(found[3], "weight")
    parametrize.remove_parametrizations(plain[3], "weight")
    assert_exact(learn, plain, found, images())


def test_lazy_layers_wait_for_a_batch(learn: Learn) -> None:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.Flatten(), nn.LazyLinear(3)).double()
    with pytest.raises(ConversionError, match="'0' has no shape yet: run one batch"):
        fahooks.convert(model)
    model(images())
    assert_exact(learn, model, converted(model), images())


def test_the_meta_device_waits_for_values(learn: Learn) -> None:
    with torch.device("meta"):
        model = network()
    with pytest.raises(ConversionError, match="'0' is on the meta device: materialise and fill"):
        fahooks.convert(model)
    model.to_empty(device="cpu").load_state_dict(network().state_dict())
    assert_exact(learn, model, converted(model), images())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_scripted_models_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"convert before torch\.jit"):
        traced: Any = torch.jit.trace(network(), (images(),))
        fahooks.convert(traced)


def test_export_gives_the_plain_forward_pass() -> None:
    found = converted(network()).eval()
    exported = torch.export.export(found, (images(),))
    assert torch.equal(exported.module()(images()), network().eval()(images()))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_weights_of_another_layout(strict: bool) -> None:
    # Images that need a gradient, else the first convolution is torch's own, which no rule stands beside.
    exported: Any = torch.export.export(converted(network()).eval(), (images().requires_grad_(),), strict=strict).module()
    exported.to(memory_format=torch.channels_last)
    torch.testing.assert_close(exported(images()), network().eval()(images()))


@pytest.mark.parametrize("rule", RULES)
def test_symbolic_trace_keeps_the_rules(learn: Learn, rule: str) -> None:
    found = converted(network(), rule)
    traced = torch.fx.symbolic_trace(found)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 6
    learn(traced, images()).assert_same_bits(learn(found, images()))
    assert_exact(learn, network(), traced, images())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch's own, where it takes a second derivative
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian], ids=lambda f: f.__name__)
def test_function_transforms_are_refused_and_work_with_the_rules_off(transform: Any) -> None:
    plain, found = network(), converted(network())
    with pytest.raises(RuntimeError, match=r"torch\.func.*fahooks\.backprop"):
        transform(lambda x: found(x).sum())(images())
    with fahooks.backprop(found):
        derivative = transform(lambda x: found(x).sum())(images())
    assert torch.equal(derivative, transform(lambda x: plain(x).sum())(images()))


def test_vmap_over_samples_without_gradients() -> None:
    found = converted(network())
    with torch.no_grad():
        output = torch.func.vmap(lambda x: found(x[None])[0])(images())
    torch.testing.assert_close(output, network()(images()))


def test_second_derivatives_are_refused() -> None:
    found = converted(network())
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="feedback matrices have no second derivatives"):
        torch.autograd.grad(found(x).square().sum(), x, create_graph=True)


def test_two_optimizers_step_their_parts() -> None:
    both, one = converted(network()), converted(network())
    optimizers = [SGD(both[:3].parameters(), 0.1), SGD(both[3:].parameters(), 0.1)]
    reference = SGD(one.parameters(), 0.1)
    for _ in range(3):
        for model, used in ((both, optimizers), (one, [reference])):
            for optimizer in used:
                optimizer.zero_grad()
            model(images()).square().sum().backward()
            for optimizer in used:
                optimizer.step()
    torch.testing.assert_close(both.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert not torch.equal(both.get_parameter("0.weight"), network().get_parameter("0.weight"))


@pytest.mark.parametrize(
    "average",
    [
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        lambda model: ModelEmaV3(model, decay=0.9),
    ],
    ids=["parameters", "buffers", "timm"],
)
@pytest.mark.parametrize("rule", ["fa", "usf_sn"])
def test_averaged_copies(average: Callable[[nn.Module], Any], rule: str) -> None:
    plain, found = network(), converted(network(), rule)
    averages = [average(plain), average(found)]
    for step in range(3):
        for model, averaged in zip((plain, found), averages, strict=True):
            with torch.no_grad():
                torch.manual_seed(step)
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            update = averaged.update if hasattr(averaged, "update") else averaged.update_parameters
            update(model)
    weights = [{n: p for n, p in averaged.module.named_parameters()} for averaged in averages]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    if rule == "fa":
        torch.testing.assert_close(averages[1].module[3].feedback.matrix, found[3].feedback.matrix)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_an_average_begins_before_direct_rules_have_drawn(rule: str, use_buffers: bool) -> None:
    model = converted(network(), rule)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    drawn: list[int] = []
    for _ in range(2):
        average.update_parameters(model)
        model(images()).square().sum().backward()
        drawn.append(sum(rule.memory_bytes for rule in feedback_rules(model).values()))
    average.update_parameters(model)
    assert drawn[0] == drawn[1] > sum(rule.memory_bytes for rule in feedback_rules(average.module).values())
    fresh = converted(network(), rule)
    for copied in (average.module, fresh):
        copied(images()).square().sum().backward()
    gradients = [{n: p.grad for n, p in copied.named_parameters()} for copied in (average.module, fresh)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_one_weight_in_three_modules(learn: Learn) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(5, 5).double() for _ in range(3))
            self.b.weight = self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).tanh()).tanh())

    torch.manual_seed(0)
    plain = Three()
    found = converted(plain, "fa")
    assert found.a.weight is found.b.weight is found.c.weight
    matrices = [layer.feedback.matrix for layer in (found.a, found.b, found.c)]
    assert not torch.equal(matrices[0], matrices[1]) and not torch.equal(matrices[1], matrices[2])
    assert_exact(learn, plain, found, torch.randn(4, 5).double())


def test_a_module_called_several_times_in_a_pass(learn: Learn) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    plain = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer).double()
    assert_exact(learn, plain, converted(plain, "usf_init"), torch.randn(4, 5).double())


def test_frozen_layers_pass_the_error_on_and_get_none() -> None:
    plain = network()
    plain[3].requires_grad_(False)
    found = converted(plain)
    found(images().requires_grad_()).sum().backward()
    assert found[3].weight.grad is None and found[0].weight.grad is not None


def test_inputs_that_need_no_gradient(learn: Learn) -> None:
    model = converted(network(), "fa")
    model(images()).sum().backward()
    expected = converted(network(), "fa")
    expected(images().requires_grad_()).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected.get_parameter(name).grad), name  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rule", [*RULES, "brsf", "bp_noise", "sham"])
def test_an_empty_batch(rule: str) -> None:
    results = []
    for model in (network(), converted(network(), rule)):
        x = images()[:0].requires_grad_()
        output = model(x)
        output.sum().backward()
        results.append((output.shape, x.grad, {n: p.grad for n, p in model.named_parameters()}))
    assert results[0][0] == results[1][0] == (0, 3)
    torch.testing.assert_close(results[1][1:], results[0][1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Conv1d(2, 4, 3), (2, 6)),
        (nn.Conv2d(2, 4, 3), (2, 5, 5)),
        (nn.Conv3d(2, 4, 2), (2, 3, 3, 3)),
        (nn.ConvTranspose2d(2, 4, 3), (2, 5, 5)),
        (nn.MultiheadAttention(4, 2), (5, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unbatched_inputs(learn: Learn, layer: nn.Module, shape: tuple[int, ...], rule: str) -> None:
    plain = copy.deepcopy(layer).double()
    x = torch.randn(shape).double()
    inputs = (x, x.tanh(), x.sin()) if isinstance(layer, nn.MultiheadAttention) else (x,)
    assert_exact(learn, plain, converted(plain, rule), *inputs)


def test_complex_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    report = fahooks.convert(model)
    assert report.skipped == {"1": "complex weights are not supported"}
    assert torch.is_complex(model[1](torch.randn(2, 3, dtype=torch.complex64)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_dtypes(learn: Learn, rule: str, dtype: torch.dtype) -> None:
    plain = network().to(dtype)
    found = converted(plain, rule)
    assert {rule.dtype for rules in feedback_rules(found).values() for rule in rules.buffers()} <= {dtype}
    surrogate = copy.deepcopy(plain)
    with oracle(surrogate, feedback_rules(found)):
        expected = learn(surrogate, images(dtype=dtype))
    learned, true = learn(found, images(dtype=dtype)), learn(plain, images(dtype=dtype))
    torch.testing.assert_close(learned.outputs, true.outputs, rtol=0, atol=0)
    assert {gradient.dtype for gradient in learned.gradients.values()} == {dtype}
    assert learned.distance(expected) < {torch.bfloat16: 0.03}.get(dtype, 0.005) < learned.distance(true)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_channels_last(learn: Learn, rule: str, dimensions: int) -> None:
    layers: Any = {2: (nn.Conv2d, torch.channels_last), 3: (nn.Conv3d, torch.channels_last_3d)}
    convolution, memory_format = layers[dimensions]
    torch.manual_seed(0)
    plain = nn.Sequential(convolution(3, 6, 3, padding=1), nn.ReLU(), convolution(6, 4, 3)).double()
    plain.to(memory_format=memory_format)
    found = converted(plain, rule)
    for found_rule in feedback_rules(found).values():
        assert all(buffer.is_contiguous(memory_format=memory_format) for buffer in found_rule.buffers())
    x = torch.randn(2, 3, *[5] * dimensions).double().to(memory_format=memory_format)
    assert_exact(learn, plain, found, x)
    assert found(x).stride() == plain(x).stride()
    moved = converted(network() if dimensions == 2 else plain, rule).to(memory_format=memory_format)
    for found_rule in feedback_rules(moved).values():
        for buffer in found_rule.buffers():
            assert buffer.dim() < dimensions + 2 or buffer.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_accumulation(rule: str) -> None:
    whole, parts = converted(network(), rule), converted(network(), rule)
    whole(images()).square().sum().backward()
    for part in images().split(1):
        parts(part).square().sum().backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name).grad, parameter.grad)


def test_lora_on_top_of_a_converted_model() -> None:
    from peft import LoraConfig, get_peft_model

    plain, base = network(dtype=torch.float32), converted(network(dtype=torch.float32), "fa")
    adapted: Any = get_peft_model(base, LoraConfig(target_modules=["3"], r=2, init_lora_weights=False))
    x = images(dtype=torch.float32)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), plain(x))
    adapted(x).square().sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert {name.rpartition("lora_")[2] for name in trained} == {"A.default.weight", "B.default.weight"}
    wrapped: Any = adapted.base_model.model[3]
    assert fahooks.audit(adapted, x, ignore=["*lora_*"]).clean
    hidden = torch.randn(2, 96, requires_grad=True)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(wrapped, name)["default"].weight.zero_()
    wrapped(hidden).sum().backward()
    matrix: Any = wrapped.base_layer.feedback.matrix
    torch.testing.assert_close(hidden.grad, torch.ones(2, 8) @ matrix)


def test_optimizers_made_before_and_after_converting_step_alike() -> None:
    before, after = network(), network()
    early = Adam(before.parameters(), 0.01)
    fahooks.convert(before, "usf_sn")
    fahooks.convert(after, "usf_sn")
    late = Adam(after.parameters(), 0.01)
    for model, optimizer in ((before, early), (after, late)):
        model(images()).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(before.state_dict(), after.state_dict(), rtol=0, atol=0)
