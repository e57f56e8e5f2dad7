from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fahooks
from fahooks import plugins
from fahooks.reference import oracle
from fahooks.surgery import FeedbackLayer, feedback_layers, feedback_rules

Learn = Callable[..., Any]
Make = Callable[[], nn.Module]
M = TypeVar("M", bound=nn.Module)

RULES = ["sham", "fa", "usf", "usf_init", "usf_sn", "frsf", "kp", "wm"]
CHANGING = RULES[1:]
"""The rules whose gradients are not those of backpropagation."""

DIRECT = ["brsf", "bp_noise", "dfa", "dense_fa", "drtp"]
"""The rules that draw anew, or send something else than B^T delta: no surrogate of a single layer is their oracle."""


class Standardised(nn.Conv2d):
    """Weight standardisation, as timm's StdConv2d does it: the call's weight is made of the layer's."""

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SamePadded(nn.Conv2d):
    """Pads its input itself, and calls by keywords."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(weight=self.weight, bias=self.bias, input=F.pad(input, (0, 1, 0, 1)), stride=self.stride)


class LowRank(nn.Linear):
    """Calls F.linear with its weight, and with others that its rule is not for, one of them of the same shape."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__(inward, outward)
        self.down = nn.Parameter(torch.randn(1, inward))
        self.up = nn.Parameter(torch.randn(outward, 1))
        self.other = nn.Parameter(torch.randn(outward, inward))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up) * F.linear(input, self.other)


class Residual(nn.Linear):
    """A layer that holds another layer, of its own shape."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.inner = nn.Linear(size, size)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(self.inner(input))) + self.inner(input)


LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "linear, rank 1": (lambda: nn.Linear(5, 4), (5,)),
    "linear, rank 4": (lambda: nn.Linear(5, 4), (2, 3, 2, 5)),
    "linear, rank 2 of a larger one": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 5, padding="same", dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (2, 4, 7, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv2d, unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv2d, circular same": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
    "conv2d, replicate": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate"), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (1, 2, 3, 4, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 3, 3)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 2, 3, 2)),
    "standardised weight": (lambda: Standardised(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "padded input, keywords": (lambda: SamePadded(4, 6, 2), (2, 4, 5, 5)),
    "other weights beside": (lambda: LowRank(5, 4), (3, 5)),
    "a layer in a layer": (lambda: Residual(4), (3, 4)),
}

each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
each_rule = pytest.mark.parametrize("rule", RULES)
each_rule_of_all = pytest.mark.parametrize("rule", RULES + DIRECT)
each_changing_rule = pytest.mark.parametrize("rule", CHANGING)


def seeded(make: Callable[[], M]) -> M:
    torch.manual_seed(0)
    return make()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


LABELS = torch.arange(4) % 3


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def pair(make: Callable[[], M], rule: Any = "fa", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[M, M]:
    """A plain model and the same, converted."""
    plain = seeded(make).to(dtype)
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule, **options)
    return plain, converted


def assert_oracle(learn: Learn, plain: nn.Module, converted: nn.Module, *inputs: Any, **options: Any) -> None:
    """Gradients of the converted model are those of the surrogate, and not those of the plain one."""
    surrogate = copy.deepcopy(plain)
    rules = feedback_rules(converted)
    expected = learn(surrogate, *inputs, around=lambda: oracle(surrogate, rules), **options)
    learn(converted, *inputs, **options).assert_oracle(expected, learn(plain, *inputs, **options))


@each_rule_of_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_keep_their_bits(rule: str, dtype: torch.dtype, training: bool) -> None:
    plain, converted = pair(network, rule, dtype)
    for enabled in (True, False):
        outputs: list[Tensor] = []
        for model in (plain, converted):
            torch.manual_seed(0)
            with torch.set_grad_enabled(enabled):
                outputs.append(model.train(training)(images(dtype)))
        assert torch.equal(*outputs)
    torch.testing.assert_close(plain.state_dict(), {k: converted.state_dict()[k] for k in plain.state_dict()}, rtol=0, atol=0)


@each_changing_rule
@each_layer
def test_gradients_of_a_layer_equal_the_oracle(learn: Learn, make: Make, shape: tuple[int, ...], rule: str) -> None:
    plain, converted = pair(make, rule)
    assert_oracle(learn, plain, converted, torch.randn(shape).double())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "a layer in a layer"])
def test_gradients_of_a_layer_whose_b_is_drawn_anew_equal_the_oracle(learn: Learn, name: str) -> None:
    """Of rules that begin at the same draw; a layer that is called twice would ask for the two in another order."""
    make, shape = LAYERS[name]
    plain, converted = pair(make, "brsf")
    rules, x = copy.deepcopy(feedback_rules(converted)), torch.randn(shape).double()
    surrogate = copy.deepcopy(plain)
    expected = learn(surrogate, x, around=lambda: oracle(surrogate, rules))
    learn(converted, x).assert_oracle(expected, learn(plain, x))
    assert learn(converted, x).distance(expected) > 0.01, "control: the next draw is another"


@each_changing_rule
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_network_equal_the_oracle(learn: Learn, rule: str, training: bool) -> None:
    plain, converted = pair(network, rule)
    assert_oracle(learn, plain.train(training), converted.train(training), images(torch.float64))


def test_gradients_of_mixed_rules_equal_the_oracle(learn: Learn) -> None:
    plain, converted = pair(network, {"0": "usf_sn", "4": torch.sign, "9": "bp", "*": {"rule": "fa", "gain": 3}})
    assert_oracle(learn, plain, converted, images(torch.float64))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sham_is_backpropagation_to_the_last_bit(learn: Learn, make: Make, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, converted = pair(make, "sham", dtype)
    assert feedback_layers(converted)
    x = torch.randn(shape).to(dtype)
    learn(converted, x).assert_same_bits(learn(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sham_network_is_backpropagation_to_the_last_bit(
    learn: Learn, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    plain, converted = pair(network, "sham", dtype)
    _, other = pair(network, "fa", dtype)
    x = images(dtype).to(memory_format=memory_format)
    for model in (plain, converted, other):
        model.to(memory_format=memory_format)
    learn(converted, x).assert_same_bits(learn(plain, x))
    with pytest.raises(AssertionError):
        learn(other, x).assert_same_bits(learn(plain, x))


def test_inputs_without_gradient_need_no_feedback(learn: Learn) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("no error is sent")

    plain, converted = pair(lambda: nn.Linear(3, 2), refuse)
    x = torch.randn(4, 3).double()
    for model in (plain, converted):
        model(x).sum().backward()
    torch.testing.assert_close(converted.weight.grad, plain.weight.grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no error is sent"):
        learn(converted, x)


@pytest.mark.parametrize("frozen", ["0", "4", "6", "9"])
def test_frozen_layers_still_send_the_error_through_feedback(learn: Learn, frozen: str) -> None:
    plain, converted = pair(network)
    for model in (plain, converted):
        model.get_submodule(frozen).requires_grad_(False)
    assert_oracle(learn, plain, converted, images(torch.float64))
    assert all(parameter.grad is None for parameter in converted.get_submodule(frozen).parameters())


def test_gradients_accumulate(learn: Learn) -> None:
    _, converted = pair(network)
    converted.eval()
    once = learn(converted, images(torch.float64)).gradients
    for _ in range(2):
        torch.manual_seed(0)
        output = converted(images(torch.float64))
        (output * torch.randn_like(output)).sum().backward()
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * once[name])


def test_a_layer_called_several_times_in_a_pass(learn: Learn) -> None:
    def unrolled() -> nn.Module:
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)

    plain, converted = pair(unrolled)
    assert len(feedback_rules(converted)) == 1
    assert_oracle(learn, plain, converted, torch.randn(2, 4).double())


@pytest.mark.parametrize(("include", "rules"), [(None, 2), ("inner", 1), (r"", 1)], ids=["both", "the inner", "the outer"])
def test_layers_in_layers_keep_their_own_rules(learn: Learn, include: str | None, rules: int) -> None:
    plain = seeded(lambda: Residual(4)).double()
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, include=include if include is None else lambda name, module: name == include)
    assert len(feedback_rules(converted)) == rules
    assert_oracle(learn, plain, converted, torch.randn(3, 4).double())


def test_parameters_keep_their_identity_and_an_optimizer_made_before_still_steps(learn: Learn) -> None:
    model = seeded(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    fahooks.convert(model)
    for _ in range(2):
        learn(model, images())
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert not torch.equal(parameter, before[name][1])
    assert [group["params"] for group in optimizer.param_groups] == [list(model.parameters())]


def test_hooks_attributes_and_flags_survive() -> None:
    model = seeded(network)
    layer = model[6]
    assert isinstance(layer, nn.Linear)
    called: list[str] = []
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer.register_full_backward_hook(lambda *_: called.append("backward"))
    vars(layer)["note"] = "an attribute"
    model[0].eval()
    model[4].requires_grad_(False)
    for change in (fahooks.convert, fahooks.revert):
        change(model)
        called.clear()
        model(images()).sum().backward()
        assert called == ["before", "after", "backward"]
        assert layer.note == "an attribute"
        assert [module.training for module in model] == [False] + [True] * 9
        assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] + [True] * 4


def test_rules_follow_the_mode_of_their_layer() -> None:
    model = seeded(network).eval()
    fahooks.convert(model)
    assert not any(rule.training for rule in feedback_rules(model).values())
    model.train()
    assert all(rule.training for rule in feedback_rules(model).values())


def test_a_shared_layer_has_one_rule() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    report = fahooks.convert(model)
    assert report.converted == ["first"] == list(feedback_rules(model))
    assert model["first"] is shared is model.get_submodule("second.0")


def test_tied_weights_stay_tied_and_have_a_feedback_matrix_each(learn: Learn) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    plain, converted = pair(tied)
    assert converted.get_parameter("0.weight") is converted.get_parameter("2.weight")
    first, second = (rule.get_buffer("matrix") for rule in feedback_rules(converted).values())
    assert not torch.equal(first, second)
    assert_oracle(learn, plain, converted, torch.randn(2, 3).double())


@each_rule_of_all
def test_converting_does_not_move_the_global_generator(rule: str) -> None:
    model = seeded(network)
    before = torch.get_rng_state()
    fahooks.convert(model, rule)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)


@each_rule_of_all
def test_revert_gives_back_the_plain_model(learn: Learn, rule: str) -> None:
    plain, model = pair(network, rule)
    attributes = {name: set(vars(module)) for name, module in plain.named_modules()}
    fahooks.revert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    learn(model, images(torch.float64)).assert_same_bits(learn(plain, images(torch.float64)))
    fahooks.revert(model)
    assert not feedback_layers(model)


@each_rule_of_all
def test_converting_again_with_the_same_arguments_changes_nothing(rule: str) -> None:
    _, model = pair(network, rule, seed=3)
    rules = feedback_rules(model)
    state = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    report = fahooks.convert(model, rule, seed=3)
    assert report.converted == ["0", "4", "6", "9"]
    assert all(found is rules[name] for name, found in feedback_rules(model).items())
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{"rule": "usf_init"}, {"seed": 1}, {"gain": 2.0}, {"include": "6"}, {"rule": {"4": "fa"}}, {"rule": "usf", "exclude": "0"}],
    ids=str,
)
def test_converting_again_with_other_arguments_gives_what_converting_once_does(learn: Learn, arguments: dict[str, Any]) -> None:
    _, twice = pair(network)
    fahooks.convert(twice, **arguments)
    _, once = pair(network, **arguments)
    assert repr(twice) == repr(once)
    learn(twice, images(torch.float64)).assert_same_bits(learn(once, images(torch.float64)))
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)
    assert learn(twice, images(torch.float64)).distance(learn(pair(network)[1], images(torch.float64))) > 0.01


def test_a_conversion_that_is_refused_changes_nothing() -> None:
    model = seeded(network)
    with pytest.raises(ValueError, match="matches none"):
        fahooks.convert(model, {"0": "fa", "nothing": "usf"})
    with pytest.raises(ValueError, match="init must be"):
        fahooks.convert(model, {"0": "fa", "4": {"rule": "fa", "init": "none"}})
    assert not feedback_layers(model)
    fahooks.convert(model)
    rules = feedback_rules(model)
    with pytest.raises(ValueError, match="no rule is named"):
        fahooks.convert(model, "unknown")
    assert all(rule is rules[name] for name, rule in feedback_rules(model).items())


def test_backprop_gives_true_gradients_nests_and_restores(learn: Learn) -> None:
    plain, model = pair(network)
    x = images(torch.float64)
    true, ruled = learn(plain, x), learn(model, x)
    assert ruled.distance(true) > 0.01
    with fahooks.backprop(model):
        learn(model, x).assert_same_bits(true)
        with fahooks.backprop(model[0]), fahooks.backprop(model):
            learn(model, x).assert_same_bits(true)
        learn(model, x).assert_same_bits(true)
    learn(model, x).assert_same_bits(ruled)
    with pytest.raises(KeyError), fahooks.backprop(model):
        raise KeyError
    learn(model, x).assert_same_bits(ruled)


def test_backprop_of_a_part_leaves_the_rest_to_its_rules(learn: Learn) -> None:
    plain, model = pair(network)
    _, partly = pair(network, exclude=["0", "4"])
    x = images(torch.float64)
    with fahooks.backprop(nn.Sequential(*model[:5])):
        found = learn(model, x)
    found.assert_same_bits(learn(partly, x))
    assert found.distance(learn(plain, x)) > 0.01


def test_backprop_around_revert_leaves_no_trace() -> None:
    plain, model = pair(network)
    with fahooks.backprop(model):
        fahooks.revert(model)
    assert [set(vars(module)) for module in model.modules()] == [set(vars(module)) for module in plain.modules()]


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}

each_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


@pytest.mark.filterwarnings("ignore:.* its B does not learn")
@each_rule
@each_copy
def test_copies_learn_alike_and_apart(learn: Learn, duplicate: Callable[[nn.Module], nn.Module], rule: str) -> None:
    plain, model = pair(network, rule)
    x = images(torch.float64)
    expected = learn(model, x)
    twin = duplicate(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
        for rule_of_twin in feedback_rules(twin).values():
            for buffer in rule_of_twin.buffers():
                buffer.add_(1)
    learn(model, x).assert_same_bits(expected)
    assert learn(twin, x).distance(expected) > 0.01
    fahooks.revert(twin)
    assert not feedback_layers(twin) and feedback_layers(model)
    assert list(twin.state_dict()) == list(plain.state_dict())


@each_copy
def test_converting_a_copy_again_changes_nothing(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    twin = duplicate(pair(network, "usf_init")[1])
    rules = feedback_rules(twin)
    fahooks.convert(twin, "usf_init")
    assert all(rule is rules[name] for name, rule in feedback_rules(twin).items())


@each_rule_of_all
def test_plain_checkpoints_load_strictly(learn: Learn, rule: str) -> None:
    plain, model = pair(network, rule)
    torch.manual_seed(9)
    other = network().double()
    model.load_state_dict(other.state_dict(), strict=True)
    for name, parameter in other.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert parameter.dim() < 2 or not torch.equal(plain.get_parameter(name), parameter)
    expected = copy.deepcopy(other)
    fahooks.convert(expected, rule)
    found, fresh = (learn(m, images(torch.float64), around=partial(fahooks.targets, m, LABELS)) for m in (model, expected))
    found.assert_same_bits(fresh)


@pytest.mark.parametrize("rule", ["fa", "usf_init"])
def test_converted_checkpoints_restore_feedback(learn: Learn, rule: str) -> None:
    _, source = pair(network, rule, seed=1)
    _, target = pair(network, rule, seed=2)
    x = images(torch.float64)
    assert learn(target, x).distance(learn(source, x)) > 0.01
    target.load_state_dict(source.state_dict(), strict=True)
    learn(target, x).assert_same_bits(learn(source, x))
    fahooks.revert(source)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        source.load_state_dict(target.state_dict(), strict=True)


@contextmanager
def unchanged_global_state() -> Iterator[None]:
    default = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("rule", ["fa", "usf_init"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.to(torch.float16),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.to("meta"),
    ],
    ids=["double", "bfloat16", "float16", "channels_last", "meta"],
)
def test_feedback_follows_the_weight(rule: str, change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(pair(network, rule, torch.float32)[1])
    for layer in feedback_layers(model).values():
        weight = layer.get_parameter("weight")
        (matrix,) = layer.feedback.buffers()
        assert (matrix.dtype, matrix.device, matrix.stride()) == (weight.dtype, weight.device, weight.stride())
    x = images().to(weight.dtype).to(weight.device)
    model(x.requires_grad_()).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_the_default_dtype_does_not_change_feedback() -> None:
    _, expected = pair(network, dtype=torch.float32)
    model = seeded(network)
    with unchanged_global_state():
        torch.set_default_dtype(torch.float64)
        fahooks.convert(model)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_the_default_device_does_not_change_feedback() -> None:
    _, expected = pair(network, dtype=torch.float32)
    model = seeded(network)
    with torch.device("meta"):
        fahooks.convert(model)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_layers_keep_their_class_and_share_one_class_with_feedback() -> None:
    _, model = pair(network)
    first, second = model.get_submodule("0"), model.get_submodule("4")
    assert type(first) is type(second)
    assert isinstance(first, nn.Conv2d) and isinstance(first, FeedbackLayer)
    assert type(first).__name__ == "FeedbackConv2d"
    assert "(feedback): FeedbackAlignment(init='fan_out'" in repr(first)
    assert type(model.get_submodule("6")) is not type(first)


def test_the_model_itself_may_be_the_layer(learn: Learn) -> None:
    plain, converted = pair(lambda: nn.Linear(4, 3))
    assert list(feedback_rules(converted)) == [""]
    assert_oracle(learn, plain, converted, torch.randn(2, 4).double())


def test_no_rule_of_the_package_is_left_out_of_these_tests() -> None:
    assert {"bp", *RULES, *DIRECT} <= set(fahooks.list_rules())
    ours = {entry.name for entry in plugins.rules if str(entry.target.__module__).startswith("fahooks.")}
    assert ours == {"bp", *RULES, *DIRECT}


@pytest.mark.parametrize("rule", DIRECT)
def test_direct_rules_give_every_parameter_a_gradient_and_follow_the_mode_and_the_seed(learn: Learn, rule: str) -> None:
    plain, model = pair(network, rule)
    (_, twin), (_, other) = pair(network, rule), pair(network, rule, seed=1)
    found, same, different = (
        learn(m, images(torch.float64), around=partial(fahooks.targets, m, LABELS)) for m in (model, twin, other)
    )
    true = learn(plain, images(torch.float64))
    torch.testing.assert_close(found.outputs, true.outputs, rtol=0, atol=0)
    assert found.gradients.keys() == true.gradients.keys()
    assert found.distance(true) > 0.1, "control: the gradients are those of backpropagation"
    found.assert_same_bits(same)
    assert (found.distance(different) > 0.1) is (rule != "bp_noise"), "its noise comes from the global generator"
    assert all(rule_of_model.training for rule_of_model in feedback_rules(model).values())
    assert not any(rule_of_model.training for rule_of_model in feedback_rules(model.eval()).values())


def test_a_weight_replaced_by_one_of_another_shape_asks_for_a_new_conversion():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fahooks.convert(model, "fa")
    kept = feedback_rules(model)["0"]
    model[1].weight = nn.Parameter(torch.randn(5, 4))
    model[1].bias = nn.Parameter(torch.randn(5))
    with pytest.raises(ValueError, match=r"shape \(5, 4\).*shape \(2, 4\).*convert again"):
        model(torch.randn(1, 3))
    fahooks.convert(model, "fa")
    assert model(torch.randn(1, 3)).shape == (1, 5)
    assert feedback_rules(model)["0"] is kept, "control: rules of other layers stay"


def test_rules_with_other_option_values_replace_those_of_values_that_print_alike():
    class Fixed(fahooks.Rule):
        def __init__(self, *, matrix: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("matrix", matrix)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return self.get_buffer("matrix").view_as(weight)

    model = nn.Linear(50, 100)
    one = torch.zeros(5000)
    other = one.index_fill(0, torch.tensor([2500]), 1.0)
    assert repr(one) == repr(other)
    fahooks.convert(model, Fixed, matrix=one)
    fahooks.convert(model, Fixed, matrix=other)
    assert feedback_rules(model)[""].get_buffer("matrix").sum() == 1


def test_parameters_shaped_like_weights_that_nothing_names_are_in_the_report():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.projection = nn.Parameter(torch.randn(4, 3))
            self.position_bias_table = nn.Parameter(torch.randn(4, 3))
            self.token = nn.Parameter(torch.zeros(1, 4))

    report = fahooks.convert(Bare(), "fa")
    assert report.converted == ["head"]
    assert list(report.skipped) == ["projection"]
    assert "no adapter names it" in report.skipped["projection"]
