from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import DirectFeedbackAlignment
from fahooks.surgery import feedback_layers, feedback_rules

Gradients = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]
Send = Callable[[str, Mapping[str, Tensor], Tensor], Tensor]

LAYERS = ["conv1", "conv2", "fc1", "fc2"]


class Net(nn.Module):
    """Two convolutions and two linear layers, on [N, 2, 7, 7]; in segments that checkpointing computes again, if asked to."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 2, dilation=2, groups=2)
        self.fc1 = nn.Linear(24, 8)
        self.fc2 = nn.Linear(8, 3)
        self.reentrant = reentrant
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x), inplace=True)).tanh()

    def classify(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.flatten(1)), inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.classify(self.features(x))
        h: Any = checkpoint(self.features, x, use_reentrant=self.reentrant)
        output: Any = checkpoint(self.classify, h, use_reentrant=self.reentrant)
        return output


def images(samples: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(samples, 2, 7, 7, generator=torch.Generator().manual_seed(seed)).double()


def labels(samples: int = 3) -> Tensor:
    return torch.arange(samples) % 3


def entropy(output: Tensor) -> Tensor:
    return F.cross_entropy(output, labels(len(output)))


def squares(output: Tensor) -> Tensor:
    return output.square().sum()


def converted(rule: Any = "dfa", reentrant: bool | None = None, **options: Any) -> Net:
    net = Net(reentrant)
    fahooks.convert(net, rule, **options)
    return net


def gradients(model: nn.Module, x: Tensor, loss: Loss = entropy) -> Gradients:
    """Of the parameters, and of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(3)
    loss(model(x)).backward()
    leaves = {**dict(model.named_parameters()), "input": x}
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}


def matrix(model: nn.Module, name: str) -> Tensor:
    """B [units, outputs] of a layer."""
    rule: Any = feedback_rules(model)[name]
    return rule.matrix.values.double()


def by_hand(net: Net, x: Tensor, send: Send, loss: Loss = entropy) -> Gradients:
    """Gradients of the network's parameters and input, written out layer by layer.

    `send(name, deltas, x)` is the error for the input x of a layer, given delta of that layer and of all later ones; that of the
    last layer is the error at the output.
    """
    with torch.no_grad():
        u1 = F.conv2d(x, net.conv1.weight, net.conv1.bias, 2, 1)
        u2 = F.conv2d(u1.relu(), net.conv2.weight, net.conv2.bias, 1, 0, 2, 2)
        u3 = F.linear(u2.tanh().flatten(1), net.fc1.weight, net.fc1.bias)
        u4 = F.linear(u3.relu(), net.fc2.weight, net.fc2.bias)
    output = u4.clone().requires_grad_()
    deltas = {"fc2": torch.autograd.grad(loss(output), output)[0]}
    with torch.no_grad():
        deltas["fc1"] = send("fc2", deltas, u3.relu()) * (u3 > 0)
        deltas["conv2"] = send("fc1", deltas, u2.tanh().flatten(1)).view_as(u2) * (1 - u2.tanh() ** 2)
        deltas["conv1"] = send("conv2", deltas, u1.relu()) * (u1 > 0)
        return {
            "input": send("conv1", deltas, x),
            "conv1.weight": conv2d_weight(x, net.conv1.weight.shape, deltas["conv1"], stride=2, padding=1),
            "conv1.bias": deltas["conv1"].sum((0, 2, 3)),
            "conv2.weight": conv2d_weight(u1.relu(), net.conv2.weight.shape, deltas["conv2"], dilation=2, groups=2),
            "conv2.bias": deltas["conv2"].sum((0, 2, 3)),
            "fc1.weight": deltas["fc1"].t() @ u2.tanh().flatten(1),
            "fc1.bias": deltas["fc1"].sum(0),
            "fc2.weight": deltas["fc2"].t() @ u3.relu(),
            "fc2.bias": deltas["fc2"].sum(0),
        }


def through(name: str, weight: Tensor, deltas: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """weight^T delta of a layer, for W or for an fa-like B."""
    if name == "conv1":
        return conv2d_input(x.shape, weight, deltas[name], stride=2, padding=1)
    if name == "conv2":
        return conv2d_input(x.shape, weight, deltas[name], dilation=2, groups=2)
    return deltas[name] @ weight


def send_true(net: Net) -> Send:
    return lambda name, deltas, x: through(name, net.get_parameter(f"{name}.weight"), deltas, x)


def send_direct(net: Net) -> Send:
    return lambda name, deltas, x: (deltas["fc2"] @ matrix(net, name).t()).view_as(x)


def distance(found: Gradients, expected: Gradients) -> float:
    """The largest difference, relative to the norm."""
    assert found.keys() == expected.keys()
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


def assert_close(found: Gradients, expected: Gradients) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def assert_same(found: Gradients, expected: Gradients) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_hand_written_network_is_the_network() -> None:
    assert_close(by_hand(net := Net(), images(), send_true(net)), gradients(net, images()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", [entropy, squares, lambda output: output[:, 1].exp().sum()])
def test_dfa_sends_b_e_to_every_layer(loss: Loss, training: bool) -> None:
    net = converted().train(training)
    found = gradients(net, images(), loss)
    assert_close(found, by_hand(net, images(), send_direct(net), loss))
    assert_close({"fc2.weight": found["fc2.weight"]}, {"fc2.weight": gradients(Net(), images(), loss)["fc2.weight"]})
    assert distance(found, gradients(Net(), images(), loss)) > 0.1, "control: the gradients are those of backpropagation"


def test_what_reaches_the_input_of_every_layer_is_b_e() -> None:
    net, received = converted(), {}
    for name in LAYERS:

        def listen(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            inputs[0].register_hook(partial(received.__setitem__, name))

        net.get_submodule(name).register_forward_pre_hook(listen)
    output = net(images().requires_grad_())
    (e,) = torch.autograd.grad(entropy(output), output, retain_graph=True)
    entropy(output).backward()
    assert received.keys() == set(LAYERS)
    for name, signal in received.items():
        torch.testing.assert_close(signal.flatten(1), e @ matrix(net, name).t())


@pytest.mark.parametrize("feedback", ["dense", "seeded"])
def test_a_signal_lies_in_memory_as_what_it_is_sent_to(feedback: str) -> None:
    found: list[Gradients] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = converted(feedback=feedback).to(memory_format=layout)
        received: list[Tensor] = []

        def listen(module: nn.Module, inputs: tuple[Tensor, ...], received: list[Tensor] = received) -> None:
            inputs[0].register_hook(received.append)

        net.conv2.register_forward_pre_hook(listen)
        found.append(gradients(net, images().contiguous(memory_format=layout)))
        (signal,) = received
        assert signal.is_contiguous(memory_format=layout)
    assert_close(found[1], found[0])


@pytest.mark.parametrize("rule", ["dfa", "dense_fa", "drtp"])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_keep_their_bits(rule: str, training: bool) -> None:
    net, plain = converted(rule).train(training), Net().train(training)
    assert torch.equal(net(images().requires_grad_()), plain(images()))
    with torch.no_grad():
        assert torch.equal(net(images()), plain(images()))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of 1 to 3 dimensions, transposed or not, and an input for it, batched or not."""
    dimensions, groups, transposed = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.booleans())
    kernel = draw(st.lists(st.integers(1, 3), min_size=dimensions, max_size=dimensions))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding: Any = draw(st.integers(0, 1)) if transposed or stride > 1 else draw(st.sampled_from([0, 1, "same", "valid"]))
    names = [f"Conv{'Transpose' if transposed else ''}{n}d" for n in (1, 2, 3)]
    settings_of = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = getattr(nn, names[dimensions - 1])(2 * groups, 3 * groups, tuple(kernel), **settings_of)
    size = [draw(st.integers(5, 6)) for _ in range(dimensions)]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return layer.double(), torch.randn(*batch, 2 * groups, *size).double()


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A linear layer, and an input of 1 to 4 dimensions for it."""
    torch.manual_seed(draw(st.integers(0, 99)))
    shape = draw(st.lists(st.integers(1, 3), max_size=3))
    return nn.Linear(4, 3, bias=draw(st.booleans())).double(), torch.randn(*shape, 4).double()


def with_output(layer: nn.Module, x: Tensor, samples: int) -> nn.Sequential:
    """The layer, with a linear one behind it as the network's last."""
    start = 0 if samples == 1 and x.dim() < 2 or _unbatched(layer, x) else 1
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(start), nn.Linear(layer(x).numel() // samples, 3).double())


def assert_direct(layer: nn.Module, x: Tensor, samples: int, **options: Any) -> None:
    """x gets B e, and the layer's parameters what autograd makes of the error that its output gets from the next B."""
    model = with_output(layer, x, samples)
    plain = copy.deepcopy(model)
    fahooks.convert(model, "dfa", **options)
    found = gradients(model, x, squares)

    u = plain[0](x)
    h = plain[1:-1](u)
    e = 2 * plain[-1](h).detach()
    signal = (e.view(samples, 3) @ matrix(model, "3").t()).view_as(h)
    parameters = list(plain[0].parameters())
    expected = dict(zip(dict(plain[0].named_parameters(prefix="0")), torch.autograd.grad(h, parameters, signal), strict=True))
    expected["input"] = (e.view(samples, 3) @ matrix(model, "0").t()).view_as(x)
    torch.testing.assert_close({name: found[name] for name in expected}, expected)
    assert distance(found, gradients(plain, x, squares)) > 1e-3, "control: B e is W^T delta"


def _unbatched(layer: nn.Module, x: Tensor) -> bool:
    return not isinstance(layer, nn.Linear) and x.dim() == layer.get_parameter("weight").dim() - 1


def surrogate(
    plain: nn.Module,
    x: Tensor,
    signal: Callable[[str, Tensor, Tensor], Tensor],
    names: list[str],
    loss: Loss,
    output: bool = False,
) -> Gradients:
    """Plain autograd on a model cut at the inputs, or outputs, of modules, each of which gets `signal(name, e, tensor)`."""
    taken: list[tuple[str, Tensor]] = []

    def take(name: str) -> Callable[..., Any]:
        def cut(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor | None = None) -> Any:
            tensor = inputs[0] if result is None else result
            taken.append((name, tensor))
            return tensor.detach()

        return cut

    for name in names:
        module = plain.get_submodule(name)
        _ = module.register_forward_hook(take(name)) if output else module.register_forward_pre_hook(take(name))
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    result = plain(x)
    value = loss(result)
    (e,) = torch.autograd.grad(value, result, retain_graph=True)
    for name, tensor in taken:
        if tensor is not result:
            value = value + (tensor * signal(name, e, tensor)).sum()
    leaves = {**dict(plain.named_parameters()), "input": x}
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def mixed_bag() -> nn.Sequential:
    """What nets are made of beside layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3),
        nn.GroupNorm(2, 6),
        nn.LeakyReLU(0.1, inplace=True),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.LayerNorm(8),
        nn.Hardtanh(inplace=True),
        nn.Dropout(0.3, inplace=True),
        nn.Linear(8, 3),
        nn.LogSoftmax(1),
    ).double()


def test_norms_dropout_pooling_and_overwriting_keep_their_derivatives() -> None:
    plain = mixed_bag()
    net = copy.deepcopy(plain)
    fahooks.convert(net, "dfa")
    found = gradients(net, images(), lambda output: F.nll_loss(output, labels()))

    def signal(name: str, e: Tensor, x: Tensor) -> Tensor:
        return (e @ matrix(net, name).t()).view_as(x)

    true = gradients(copy.deepcopy(plain), images(), lambda output: F.nll_loss(output, labels()))
    for module in plain:
        vars(module)["inplace"] = False
    expected = surrogate(plain, images(), signal, ["0", "4", "9", "13"], lambda output: F.nll_loss(output, labels()))
    del expected["0.bias"], found["0.bias"], true["0.bias"]  # batch norm leaves it nothing but rounding
    assert_close(found, expected)
    assert distance(found, true) > 0.1, "control: the gradients are those of backpropagation"


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_scaling_the_loss_scales_every_gradient(rule: str) -> None:
    net = converted(rule)
    once = gradients(net, images())
    scaled = gradients(net, images(), lambda output: 1000 * entropy(output))
    assert_close(scaled, {name: 1000 * gradient for name, gradient in once.items()})
    assert all(gradient.norm() > 0 for gradient in once.values())


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_two_forward_passes_before_two_backward_passes(rule: str) -> None:
    net = converted(rule)
    batches = [images(3, seed=1), images(2, seed=2)]
    separately = [gradients(net, batch) for batch in batches]
    inputs = [batch.clone().requires_grad_() for batch in batches]
    outputs = [net(batch) for batch in inputs]
    for output, x, expected in zip(outputs, inputs, separately, strict=True):
        net.zero_grad()
        entropy(output).backward()
        assert x.grad is not None
        found = {**{name: p.grad for name, p in net.named_parameters() if p.grad is not None}, "input": x.grad}
        assert_same(found, expected)
    assert not torch.allclose(separately[0]["fc1.weight"], separately[1]["fc1.weight"]), "control: the batches do not matter"


@pytest.mark.parametrize("rule", ["dfa", "dense_fa", "bp_noise"])
def test_backward_passes_accumulate_and_can_be_repeated(rule: str) -> None:
    net = converted(rule)
    first, second = gradients(net, images(seed=1)), gradients(net, images(seed=2))
    net.zero_grad()
    output = net(images(seed=1).requires_grad_())
    torch.manual_seed(3)
    entropy(output).backward(retain_graph=True)
    torch.manual_seed(3)
    entropy(output).backward()
    torch.manual_seed(3)
    entropy(net(images(seed=2).requires_grad_())).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name] + second[name])


def test_an_error_that_was_never_sent_is_not_used_later() -> None:
    net, fresh = converted(), converted()
    entropy(net(images(3, seed=1)))
    with torch.no_grad():
        net(images(5, seed=2))
    net.eval()
    entropy(net(images(4, seed=4)))
    assert_same(gradients(net, images(3, seed=5)), gradients(fresh.eval(), images(3, seed=5)))


class Operations(TorchDispatchMode):
    """The operations that run inside it, with their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def input_gradients(self) -> int:
        """How many convolutions computed the gradient of their input."""
        return sum(args[-1][0] for func, args in self.calls if func is torch.ops.aten.convolution_backward.default)

    def reads(self, parameter: Tensor) -> bool:
        """Whether a product read the parameter."""
        products = [args for func, args in self.calls if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)]
        own = parameter.untyped_storage().data_ptr()
        return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == own for args in products for t in args)


def backward_operations(net: Net) -> Operations:
    value = entropy(net(images().requires_grad_()))
    with Operations() as operations:
        value.backward()
    return operations


@pytest.mark.parametrize("options", [{}, {"feedback": "channel"}, {"feedback": "seeded"}], ids=str)
def test_dfa_never_computes_the_gradient_of_a_layers_own_input(options: dict[str, Any]) -> None:
    net, plain = converted(**options), Net()
    operations = backward_operations(net)
    assert operations.input_gradients() == 0
    assert not operations.reads(net.fc1.weight) and not operations.reads(net.fc2.weight)
    control = backward_operations(plain)
    assert control.input_gradients() == 2
    assert control.reads(plain.fc1.weight) and control.reads(plain.fc2.weight)


def test_the_first_layer_computes_nothing_for_an_input_without_gradient() -> None:
    net = converted()
    value = entropy(net(images()))
    value.backward()
    assert feedback_rules(net)["conv1"].matrix.values is None
    assert feedback_rules(net)["conv2"].matrix.values is not None


@pytest.mark.parametrize("frozen", [*LAYERS, "bias"])
def test_frozen_parameters_change_no_other_gradient(frozen: str) -> None:
    net = converted()
    expected = gradients(net, images())
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(frozen not in name)
    found = gradients(net, images())
    assert_same(found, {name: gradient for name, gradient in expected.items() if frozen not in name})
    assert 0 < len(found) < len(expected)


def test_channel_is_the_dense_matrix_with_entries_tied_over_positions() -> None:
    net, dense = converted(feedback="channel"), converted()
    found = gradients(net, images())
    positions = {"conv1": 49, "conv2": 16, "fc1": 1, "fc2": 1}
    shapes = {name: matrix(net, name).shape for name in LAYERS}
    assert shapes == {"conv1": (2, 3), "conv2": (4, 3), "fc1": (24, 3), "fc2": (8, 3)}

    def send(name: str, deltas: Mapping[str, Tensor], x: Tensor) -> Tensor:
        tied = matrix(net, name).repeat_interleave(positions[name], 0)
        return (deltas["fc2"] @ tied.t()).view_as(x)

    assert_close(found, by_hand(net, images(), send))
    assert distance(found, gradients(dense, images())) > 0.1, "control: the dense matrix sends the same"


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
@pytest.mark.parametrize("several", [False, True])
def test_seeded_is_dense_without_state(rule: str, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if several:
        monkeypatch.setattr("fahooks.rules.direct_matrix.SLICE", 40)
    dense, seeded = converted(rule), converted(rule, feedback="seeded")
    keys = list(seeded.state_dict())
    found = gradients(seeded, images())
    assert_close(found, gradients(dense, images()))
    assert list(seeded.state_dict()) == keys
    assert len(dense.state_dict()) > len(keys)
    assert distance(found, gradients(converted(rule, seed=1), images())) > 0.1, "control: every matrix sends the same"
    if rule == "dfa":
        assert keys == list(Net().state_dict())


def test_the_variance_is_one_over_the_outputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 25))
    fahooks.convert(net, "dfa")
    net(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    for name, units in (("0", 108), ("2", 128)):
        drawn = matrix(net, name)
        assert drawn.shape == (units, 25)
        assert abs(drawn.var().item() * 25 - 1) < 5 * (2 / drawn.numel()) ** 0.5
        assert abs(drawn.mean().item()) < 5 * (1 / 25 / drawn.numel()) ** 0.5


def test_one_seed_gives_one_matrix_whatever_else_is_converted() -> None:
    whole, part, otherwise = converted(seed=1), converted({"fc1": "dfa", "conv1": "fa"}, seed=1), converted(seed=2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for net in (whole, part, otherwise):
        entropy(net(images())).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(matrix(part, "fc1"), matrix(whole, "fc1"))
    assert not torch.equal(matrix(otherwise, "fc1"), matrix(whole, "fc1")), "control: the seed changes nothing"


MIXED = {"conv1": "fa", "conv2": "dfa", "fc1": "fa", "fc2": "bp"}


def test_rules_mix_by_layer() -> None:
    net = converted(MIXED)
    found = gradients(net, images())

    def send(name: str, deltas: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if MIXED[name] == "dfa":
            return send_direct(net)(name, deltas, x)
        weight = net.fc2.weight if name == "fc2" else feedback_rules(net)[name].get_buffer("matrix")
        return through(name, weight, deltas, x)

    assert_close(found, by_hand(net, images(), send))
    for other in ("dfa", "fa", "bp"):
        assert distance(found, gradients(converted(other), images())) > 0.1, f"control: all layers have {other}"


def test_a_layer_called_twice_sends_its_error_to_both_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)).double()
    plain = copy.deepcopy(net)
    fahooks.convert(net, "dfa")
    x = torch.randn(3, 4).double()
    found = gradients(net, x)
    expected = surrogate(plain, x, lambda name, e, tensor: e @ matrix(net, name).t(), ["0", "4"], entropy)
    assert_close(found, expected)


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_backprop_inside_gives_true_gradients(rule: str) -> None:
    net = converted(rule)
    expected = gradients(net, images())
    with fahooks.backprop(net):
        assert_same(gradients(net, images()), gradients(Net(), images()))
    assert_same(gradients(net, images()), expected)


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
@pytest.mark.parametrize("feedback", ["dense", "seeded"])
def test_checkpointing_that_is_not_reentrant_changes_no_gradient(rule: str, feedback: str) -> None:
    net, checkpointed = converted(rule, feedback=feedback), converted(rule, reentrant=False, feedback=feedback)
    found = gradients(checkpointed, images())
    assert_same(found, gradients(net, images()))
    assert distance(found, gradients(Net(), images())) > 0.1


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_reentrant_checkpointing_is_refused_with_what_to_do(rule: str) -> None:
    net = converted(rule, reentrant=True)
    with pytest.raises(InputError, match=f"{rule}: layer '.*' was called outside of the forward pass.*needs use_reentrant=False"):
        gradients(net, images())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model_changes_no_gradient(reentrant: bool) -> None:
    net = converted()
    expected = gradients(net, images())
    around: Any = lambda x: checkpoint(net, x, use_reentrant=reentrant)  # noqa: E731
    net.zero_grad()
    entropy(around(images().requires_grad_())).backward()
    assert_same({name: p.grad for name, p in net.named_parameters() if p.grad is not None}, _without(expected, "input"))


def _without(found: Gradients, *names: str) -> Gradients:
    return {name: gradient for name, gradient in found.items() if name not in names}


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_autocast_sends_the_same_errors_in_half_precision(rule: str) -> None:
    net = converted(rule).float()
    x = images().float()
    expected = gradients(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x.requires_grad_())
    assert output.dtype == torch.bfloat16
    net.zero_grad()
    entropy(output.float()).backward()
    found = {**{name: p.grad for name, p in net.named_parameters() if p.grad is not None}, "input": x.grad}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert distance(found, expected) < 0.1 < distance(found, gradients(Net().float(), x.detach()))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:Dynamo does not know how to trace"
)
@pytest.mark.parametrize(("rule", "drawn"), [("dfa", True), ("dense_fa", False)])
def test_a_compiled_model_has_the_gradients_of_eager(rule: str, drawn: bool) -> None:
    net, eager, x = small(), small(), torch.randn(4, 2, 5)
    plain = gradients(small(), x)
    for model in (net, eager):
        fahooks.convert(model, rule)
    expected = gradients(eager, x)
    if drawn:
        gradients(net, x)
    net.compile(backend="aot_eager", fullgraph=drawn)
    found = gradients(net, x)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert distance(expected, plain) > 0.1, "control: the gradients are those of backpropagation"


class Attention(nn.Module):
    """Attention on [N, 4, 6], of a sequence to itself or to its first positions, and a layer for each position."""

    def __init__(self, memory: int = 4, weights: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 2)
        self.memory = memory
        self.weights = weights
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        memory = x if self.memory == 4 else x[:, : self.memory]
        return self.head(self.attention(x, memory, memory, need_weights=self.weights)[0].tanh())


def windows() -> nn.Module:
    """timm's Swin: attention in windows, whose number is multiplied with that of the samples."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 2, "window_size": 4, "depths": (2,), "embed_dim": 8, "num_heads": (2,)}
    return timm.models.swin_transformer.SwinTransformer(num_classes=3, **options).double().eval()


ATTENTION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "torch": (Attention, (4, 6), ["dense", "channel", "seeded"]),
    "torch, with weights": (partial(Attention, weights=True), (4, 6), ["dense"]),
    "windows": (windows, (3, 16, 16), ["dense", "channel"]),
}

KINDS = [(make, shape, kind) for make, shape, kinds in ATTENTION.values() for kind in kinds]


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
@pytest.mark.parametrize(
    ("make", "shape", "feedback"), KINDS, ids=[f"{name}-{kind}" for name, (_, _, kinds) in ATTENTION.items() for kind in kinds]
)
def test_attention_keeps_the_samples_of_a_batch_apart(
    make: Callable[[], nn.Module], shape: tuple[int, ...], feedback: str, rule: str
) -> None:
    net = make()
    report = fahooks.convert(net, rule, feedback=feedback)
    assert any("attention" in name or "attn" in name for name in report.converted)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()
    found = gradients(net, x, squares)
    one_by_one = [gradients(net, sample, squares) for sample in x.split(1)]
    for name, gradient in found.items():
        parts = torch.stack([part[name] for part in one_by_one])
        torch.testing.assert_close(gradient, parts.flatten(0, 1) if name == "input" else parts.sum(0))
    assert distance(found, gradients(make(), x, squares)) > 0.1, "control: the gradients are those of backpropagation"


def test_attention_to_another_sequence_has_one_matrix_for_both_and_needs_channel() -> None:
    x = torch.randn(3, 4, 6).double()
    net, dense, every = Attention(memory=3), Attention(memory=3), Attention(memory=3)
    fahooks.convert(net, "dfa", feedback="channel")
    found = gradients(net, x, squares)
    one_by_one = [gradients(net, sample, squares) for sample in x.split(1)]
    torch.testing.assert_close(found["embed.weight"], torch.stack([part["embed.weight"] for part in one_by_one]).sum(0))
    fahooks.convert(dense, "dfa")
    with pytest.raises(InputError, match="feedback='channel', which sums over positions"):
        gradients(dense, x, squares)
    fahooks.convert(every, "dense_fa")
    with pytest.raises(InputError, match="sizes must stay"):
        gradients(every, x, squares)


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_attention_with_the_batch_in_the_second_dimension_is_refused(rule: str) -> None:
    net = Attention(batch_first=False)
    fahooks.convert(net, rule)
    with pytest.raises(InputError, match=f"{rule}: 'attention.* is called for a batch of 4, the model for one of 3"):
        net(torch.ones(3, 4, 6).double())
    fahooks.convert(net, rule, exclude="attention")
    net(torch.ones(3, 4, 6).double()).sum().backward()


class Output(dict):
    """A dict of a class of its own."""


class Several(nn.Module):
    """Returns what `make` makes of logits and of something else that is trained."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.logits = nn.Linear(5, 3)
        self.aux = nn.Linear(5, 2)
        self.make = make
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.first(x).tanh()
        return self.make(self.logits(h), self.aux(h))


SEVERAL: list[tuple[Any, Any, Callable[[Any], Tensor]]] = [
    (lambda a, b: (a, b), 0, lambda output: output[0]),
    (lambda a, b: [b, a], 1, lambda output: output[1]),
    (lambda a, b: Output(a=a, b=b), "a", lambda output: output["a"]),
]


@pytest.mark.parametrize(("make", "option", "get"), SEVERAL, ids=["tuple", "list", "dict"])
def test_the_error_is_that_of_the_chosen_output(make: Any, option: Any, get: Callable[[Any], Tensor]) -> None:
    net = Several(make)
    fahooks.convert(net, "dfa", output=option)
    plain = Several(make)
    x = torch.randn(3, 4).double()
    found = gradients(net, x, lambda output: get(output).square().sum())
    single = Several(lambda a, b: a)
    fahooks.convert(single, "dfa")
    assert_close(found, gradients(single, x, squares))
    assert distance(found, gradients(plain, x, lambda output: get(output).square().sum())) > 0.1
    assert type(net(x)) is type(plain(x))


def test_of_several_outputs_one_has_to_be_chosen() -> None:
    net = Several(lambda a, b: {"a": a, "b": b})
    fahooks.convert(net, "dfa")
    with pytest.raises(InputError, match=r"dfa: the model returns several tensors, .*'b'\): choose one with .* output="):
        net(torch.ones(2, 4).double().requires_grad_())
    with torch.no_grad():
        net(torch.ones(2, 4).double())
    fahooks.convert(net, "dfa", output="c")
    with pytest.raises(InputError, match="no tensor output='c'"):
        net(torch.ones(2, 4).double().requires_grad_())


class OwnLoss(nn.Module):
    """Computes its loss itself, as the models of transformers do when they are given labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.logits = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.logits(self.first(x).tanh())
        return {"loss": entropy(logits), "logits": logits}


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_a_loss_that_the_model_computes_itself_is_refused(rule: str) -> None:
    net = OwnLoss()
    fahooks.convert(net, rule, output="logits")
    with fahooks.targets(net, labels()):
        output = net(vectors())
    entropy(output["logits"]).backward(retain_graph=True)
    assert (net.first.weight.grad != 0).any(), "control: a loss of what it returns is not"
    torch.autograd.grad(output["logits"].sum(), net.first.weight, retain_graph=True)
    with pytest.raises(InputError, match=f"{rule}: an error reached the model's output from inside the model: compute the loss"):
        output["loss"].backward()


# Blocks: at=


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, size)
        self.fc2 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.fc2(self.fc1(x).tanh()), inplace=False)


class Residual(nn.Module):
    """A stem, three residual blocks, and a head unless the last block is the model's last."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.Sequential(Block(6), Block(6), Block(6))
        self.head = nn.Linear(6, 3) if head else nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def vectors() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("at", ["blocks.?", ["blocks.0", "blocks.[12]"], "blocks.*"], ids=["glob", "list", "nested"])
@pytest.mark.parametrize("feedback", ["dense", "seeded"])
def test_blocks_get_b_e_at_their_outputs_and_backpropagate_inside(at: Any, feedback: str) -> None:
    net = Residual()
    report = fahooks.convert(net, "dfa", at=at, feedback=feedback)
    assert report.converted == BLOCKS
    assert feedback_layers(net).keys() == set(BLOCKS)
    dense = Residual()
    fahooks.convert(dense, "dfa", at=at)
    found = gradients(net, vectors(), squares)
    gradients(dense, vectors(), squares)
    expected = surrogate(Residual(), vectors(), lambda name, e, y: e @ matrix(dense, name).t(), BLOCKS, squares, output=True)
    assert_close(found, expected)
    assert distance(found, gradients(Residual(), vectors(), squares)) > 0.1, "control: the gradients are those of backpropagation"


def test_a_residual_path_passes_nothing_into_a_block_and_something_around_a_layer() -> None:
    through_blocks, through_layers = Residual(), Residual()
    by_block = fahooks.convert(through_blocks, "dfa", at="blocks.?")
    by_layer = fahooks.convert(through_layers, "dfa")
    assert "a block gets the error that is sent to its output and no other, also where a residual path" in str(by_block)
    assert "a residual path around a layer carries the errors sent to later layers down to its input" in str(by_layer)
    assert by_block.total.startswith(
        f"{len(by_block.converted)} blocks converted, {len(by_block.left_out)} layers in and between them by "
    )
    assert by_layer.total.startswith(f"{len(by_layer.converted)} layers converted, 0 skipped")
    assert by_block.notes and by_layer.notes and by_block.notes != by_layer.notes
    assert by_block.skipped == dict.fromkeys(
        ["stem", *(f"{block}.{name}" for block in BLOCKS for name in ("fc1", "fc2")), "head"],
        "backpropagation: the error is sent to the outputs of blocks",
    )
    gradients(through_layers, vectors(), squares)
    layers = ["stem", *(f"{block}.{name}" for block in BLOCKS for name in ("fc1", "fc2")), "head"]

    def signal(name: str, e: Tensor, x: Tensor) -> Tensor:
        return e @ matrix(through_layers, name).t()

    expected = surrogate(Residual(), vectors(), signal, layers, squares)
    found = gradients(through_layers, vectors(), squares)
    assert_close(found, expected)
    # Of the first layer of a block, the input also gets what the path around it carries.
    direct = signal("blocks.2.fc1", 2 * through_layers(vectors()).detach(), vectors())
    received: list[Tensor] = []
    through_layers.blocks[2].register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(received.append) and None)
    gradients(through_layers, vectors(), squares)
    assert not torch.allclose(received[0], direct)


def test_a_block_that_is_the_models_last_gets_the_true_gradient() -> None:
    net = Residual(head=False)
    fahooks.convert(net, "dfa", at="blocks.?")
    found = gradients(net, vectors(), squares)
    signal = lambda name, e, y: e @ matrix(net, name).t()  # noqa: E731
    assert_close(found, surrogate(Residual(head=False), vectors(), signal, BLOCKS[:2], squares, output=True))
    assert feedback_rules(net)["blocks.2"].matrix.values is None
    true = gradients(Residual(head=False), vectors(), squares)
    last = [name for name in true if name.startswith("blocks.2")]
    assert_close({name: found[name] for name in last}, {name: true[name] for name in last})
    assert distance(found, true) > 0.1, "control: the gradients are those of backpropagation"


def images_through_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)), nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True))]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(27, 3)).double()


@pytest.mark.parametrize("feedback", ["dense", "seeded"])
def test_blocks_of_convolutions(feedback: str) -> None:
    net, dense = images_through_blocks(), images_through_blocks()
    for model, kind in ((net, feedback), (dense, "dense")):
        fahooks.convert(model, "dfa", at=["0", "1"], feedback=kind)
    found = gradients(net, images())
    gradients(dense, images())

    def signal(name: str, e: Tensor, y: Tensor) -> Tensor:
        return (e @ matrix(dense, name).t()).view_as(y)

    assert_close(found, surrogate(images_through_blocks(), images(), signal, ["0", "1"], entropy, output=True))


def test_blocks_have_no_channels() -> None:
    with pytest.raises(InputError, match="feedback='channel' is for layers, and at= sends to blocks: use feedback='dense'"):
        fahooks.convert(Residual(), "dfa", at="blocks.?", feedback="channel")


def test_blocks_that_are_named_wrongly_are_refused_with_a_near_miss() -> None:
    net = Residual()
    with pytest.raises(InputError, match="at: 'block.0' matches none of the .* modules - did you mean 'blocks.0'"):
        fahooks.convert(net, "dfa", at="block.0")
    assert not feedback_layers(net)


class Padded(Residual):
    """With a module that holds no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Identity()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "dfa", "at": "pool"}, "^at: no layer lies in what 'pool' selects$"),
        ({"rule": "dfa", "at": ["pool", "blocks.?"]}, "^at: no layer lies in what 'pool' selects$"),
        (
            {"blocks.0": "bp", "*": {"rule": "dfa", "at": ["blocks.0", "blocks.1"]}},
            "^at: all layers in what 'blocks.0' selects have another rule or are left out$",
        ),
    ],
)
def test_a_pattern_of_blocks_that_cuts_off_no_layer_is_refused(rule: Any, message: str) -> None:
    net = Padded()
    with pytest.raises(InputError, match=message):
        fahooks.convert(net, rule)
    assert not feedback_layers(net)
    assert fahooks.convert(net, "dfa", at="blocks.?").converted == BLOCKS


def test_the_report_says_which_layers_are_cut_at_their_outputs() -> None:
    lines = str(fahooks.convert(Residual(), "dfa", at=["blocks.?", "stem"])).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines if line.startswith("stem ")] == [
        "backpropagation: the error is sent to the outputs of blocks",
        "converted, at its output",
    ]
    assert "skipped: " not in "".join(lines) and lines[-2].startswith("4 blocks converted, 8 layers in and between them by")


def test_other_rules_hold_inside_of_blocks_and_beside_them() -> None:
    net = Residual()
    report = fahooks.convert(net, {"blocks.1.fc2": "fa", "head": "usf", "*": {"rule": "dfa", "at": "blocks.?"}})
    assert set(report.converted) == {"blocks.1.fc2", "head", *BLOCKS}
    assert distance(gradients(net, vectors(), squares), gradients(_only_blocks(), vectors(), squares)) > 0.1
    for name, module in (("head", "head"), ("blocks.1.fc2", "blocks.1.fc2")):
        rule = feedback_rules(net)[name]
        assert type(rule).__name__ in ("SignSymmetry", "FeedbackAlignment"), module


def _only_blocks() -> Residual:
    net = Residual()
    fahooks.convert(net, "dfa", at="blocks.?")
    return net


def test_only_blocks_that_hold_a_layer_of_the_rule_are_cut() -> None:
    net = Residual()
    report = fahooks.convert(net, {"blocks.0": {"rule": "dfa", "at": "blocks.?"}, "blocks.1": {"rule": "drtp", "at": "blocks.1"}})
    assert report.converted == ["blocks.0", "blocks.1"]
    assert [type(rule).__name__[:10] for rule in feedback_rules(net).values()] == ["DirectFeed", "DirectRand"]
    assert report.skipped["stem"] == report.skipped["blocks.2.fc1"] == "no pattern matches"


def test_two_rules_for_one_block_are_refused() -> None:
    net = Residual()
    with pytest.raises(InputError, match="two rules send errors to 'blocks.0'"):
        fahooks.convert(net, {"*.fc1": {"rule": "dfa", "at": "blocks.0"}, "*": {"rule": "drtp", "at": "blocks.?"}})
    assert not feedback_layers(net)


def test_a_block_must_return_one_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(Pair(3, 3))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x)[0])

    net = Model()
    fahooks.convert(net, "dfa", at="block")
    with pytest.raises(InputError, match="dfa: 'block' returns a tuple; at= needs modules that return one tensor"):
        net(torch.ones(1, 3))


def test_blocks_under_checkpointing_backprop_and_revert() -> None:
    class Checkpointed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            output: Any = checkpoint(super().forward, x, use_reentrant=False)
            return output

    net, checkpointed = Residual(), Checkpointed()
    for model in (net, checkpointed):
        fahooks.convert(model, "dfa", at="blocks.?")
    expected = gradients(net, vectors(), squares)
    assert_same(gradients(checkpointed, vectors(), squares), expected)
    with fahooks.backprop(net):
        assert_same(gradients(net, vectors(), squares), gradients(Residual(), vectors(), squares))
    assert_same(gradients(net, vectors(), squares), expected)
    fahooks.convert(net, "dfa", at="blocks.?")
    assert_same(gradients(net, vectors(), squares), expected)
    fahooks.revert(net)
    assert_same(gradients(net, vectors(), squares), gradients(Residual(), vectors(), squares))
    assert list(net.state_dict()) == list(Residual().state_dict())


# Targets: drtp


def send_targets(net: Net, targets: Tensor) -> Send:
    return lambda name, deltas, x: (targets / len(targets) @ matrix(net, name).t()).view_as(x)


@pytest.mark.parametrize(
    "targets",
    [labels(), labels().int(), labels().unsqueeze(1), F.one_hot(labels(), 3), F.one_hot(labels(), 3).float()],
    ids=["int64", "int32", "[N, 1]", "one hot", "one hot, float"],
)
def test_drtp_sends_the_targets(targets: Tensor) -> None:
    net = converted("drtp")
    with fahooks.targets(net, targets):
        found = gradients(net, images())
    assert_close(found, by_hand(net, images(), send_targets(net, F.one_hot(labels(), 3).double())))
    assert distance(found, gradients(Net(), images())) > 0.1, "control: the gradients are those of backpropagation"
    with fahooks.targets(net, targets):
        scaled = gradients(net, images(), lambda output: 1000 * entropy(output))
    assert_close(_without(scaled, "fc2.weight", "fc2.bias"), _without(found, "fc2.weight", "fc2.bias"))
    with fahooks.targets(net, targets, scale=1000):
        scaled = gradients(net, images(), lambda output: 1000 * entropy(output))
    assert_close(scaled, {name: 1000 * gradient for name, gradient in found.items()})


def test_drtp_of_a_single_output_takes_its_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    fahooks.convert(net, "drtp")
    with fahooks.targets(net, torch.tensor([0, 1, 1])):
        found = gradients(net, vectors(), squares)
    torch.testing.assert_close(found["input"], torch.tensor([[0.0], [1], [1]]).double() / 3 @ matrix(net, "0").t())


def test_drtp_takes_targets_that_are_no_classes() -> None:
    net, values = converted("drtp"), torch.randn(3, 3).double()
    with fahooks.targets(net, values):
        found = gradients(net, images(), squares)
    assert_close(found, by_hand(net, images(), send_targets(net, values), squares))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, r"drtp needs the targets: .* inside `with fahooks.targets\(model, labels\):`"),
        (labels(4), r"targets of shape \(4,\) do not fit 3 samples with 3 outputs: give class indices \[N\]"),
        (torch.ones(3, 2), r"targets of shape \(3, 2\) do not fit 3 samples with 3 outputs"),
        (torch.ones(3), r"targets of shape \(3,\) do not fit"),
        (torch.tensor([0, 3, 1]), "class indices must be from 0 to 2, got 0 to 3"),
        (torch.tensor([0, -1, 1]), "class indices must be from 0 to 2, got -1 to 1"),
    ],
)
def test_drtp_refuses_targets_that_do_not_fit(targets: Tensor | None, message: str) -> None:
    net = converted("drtp")
    with pytest.raises(InputError, match=message):
        if targets is None:
            gradients(net, images())
        else:
            with fahooks.targets(net, targets):
                gradients(net, images())


def test_drtp_at_blocks_sends_the_targets_to_their_outputs() -> None:
    net = Residual()
    fahooks.convert(net, "drtp", at="blocks.?")
    with fahooks.targets(net, labels()):
        found = gradients(net, vectors(), squares)

    def signal(name: str, e: Tensor, y: Tensor) -> Tensor:
        return F.one_hot(labels(), 3).double() / 3 @ matrix(net, name).t()

    assert_close(found, surrogate(Residual(), vectors(), signal, BLOCKS, squares, output=True))


# All later layers: dense_fa


def residual(net: Net, name: str, later: str) -> Tensor:
    """R_k [units of x, units of layer k], read from the rule."""
    rule: Any = feedback_rules(net)[name]
    return rule.residual[later].values.double()


def send_dense(net: Net, spread: Callable[[str, str, Tensor], Tensor]) -> Send:
    """B^T delta + the sum of R_k delta_k, where `spread` makes the full R_k of what the rule keeps."""

    def send(name: str, deltas: Mapping[str, Tensor], x: Tensor) -> Tensor:
        error = through(name, feedback_rules(net)[name].get_buffer("matrix"), deltas, x)
        for later in LAYERS[LAYERS.index(name) + 1 :]:
            full = spread(name, later, residual(net, name, later))
            error = error + (deltas[later].flatten(1) @ full.t()).view_as(x)
        return error

    return send


def test_dense_fa_sends_the_errors_of_all_later_layers() -> None:
    net = converted("dense_fa")
    found = gradients(net, images())
    rules: Any = feedback_rules(net)
    kept = {(name, later) for name in LAYERS for later in rules[name].residual}
    assert kept == set(itertools.combinations(LAYERS, 2))
    assert residual(net, "conv1", "conv2").shape == (2 * 7 * 7, 6 * 2 * 2)
    assert_close(found, by_hand(net, images(), send_dense(net, lambda name, later, full: full)))
    for other in (Net(), converted("fa"), converted("dfa")):
        assert distance(found, gradients(other, images())) > 0.1, "control: it is another rule"


def test_dense_fa_by_channel_ties_the_entries_over_positions() -> None:
    net = converted("dense_fa", feedback="channel")
    found = gradients(net, images())
    inputs, outputs = {"conv1": 49, "conv2": 16, "fc1": 1, "fc2": 1}, {"conv2": 4, "fc1": 1, "fc2": 1}
    assert residual(net, "conv1", "conv2").shape == (2, 6)

    def spread(name: str, later: str, values: Tensor) -> Tensor:
        return values.repeat_interleave(inputs[name], 0).repeat_interleave(outputs[later], 1)

    assert_close(found, by_hand(net, images(), send_dense(net, spread)))


def test_dense_fa_with_the_signs_of_the_weights() -> None:
    net, drawn = converted("dense_fa", sign_concordant=True), converted("dense_fa")
    found = gradients(net, images())

    def send(name: str, deltas: Mapping[str, Tensor], x: Tensor) -> Tensor:
        magnitude = feedback_rules(drawn)[name].get_buffer("matrix").abs()
        signed = magnitude * net.get_parameter(f"{name}.weight").sign()
        residuals = (deltas[k].flatten(1) @ residual(net, name, k).t() for k in LAYERS[LAYERS.index(name) + 1 :])
        return through(name, signed, deltas, x) + sum(part.view_as(x) for part in residuals)

    assert_close(found, by_hand(net, images(), send))
    assert distance(found, gradients(drawn, images())) > 0.1, "control: the signs do not matter"


def test_dense_fa_draws_b_as_fa_does_and_scales_the_residuals_by_the_units_of_the_later_layer() -> None:
    net, fa = converted("dense_fa"), converted("fa")
    gradients(net, images())
    for name in LAYERS:
        assert torch.equal(feedback_rules(net)[name].get_buffer("matrix"), feedback_rules(fa)[name].get_buffer("matrix"))
    entries = residual(net, "conv1", "conv2")
    assert abs(entries.var().item() * 24 - 1) < 5 * (2 / entries.numel()) ** 0.5


def test_dense_fa_of_layers_that_read_one_input_and_of_a_layer_called_twice() -> None:
    """q and k read the same x: neither is later than the other."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.q(x).tanh() * self.k(x).tanh())

    net = Branches()
    fahooks.convert(net, "dense_fa")
    x = vectors()
    found = gradients(net, x, squares)
    rules: Any = feedback_rules(net)
    assert {name: list(rule.residual) for name, rule in rules.items()} == {"q": ["last"], "k": ["last"], "last": []}
    with torch.no_grad():
        q, k = net.q(x).tanh(), net.k(x).tanh()
        e = 2 * net.last(q * k)
        below = e @ rules["last"].matrix
        delta_q, delta_k = below * k * (1 - q**2), below * q * (1 - k**2)
        expected = delta_q @ rules["q"].matrix + delta_k @ rules["k"].matrix
        for name in ("q", "k"):
            expected += e @ rules[name].residual["last"].values.double().t()
    torch.testing.assert_close(found["input"], expected)

    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, nn.Tanh(), layer).double()
    fahooks.convert(twice, "dense_fa")
    found = gradients(twice, x, squares)
    rule: Any = feedback_rules(twice)["0"]
    with torch.no_grad():
        h = layer(x).tanh()
        e = 2 * layer(h)
        expected = (e @ rule.matrix * (1 - h**2)) @ rule.matrix + e @ rule.residual["0"].values.double().t()
    torch.testing.assert_close(found["input"], expected)


def assert_dense(layer: nn.Module, x: Tensor, samples: int) -> None:
    """x gets B^T delta of its own layer and R e of the last one, and the layer's parameters what autograd makes of delta."""
    model = with_output(layer, x, samples)
    plain, fed = copy.deepcopy(model), copy.deepcopy(layer)
    fahooks.convert(model, "dense_fa")
    found = gradients(model, x, squares)
    rules: Any = feedback_rules(model)
    fed.get_parameter("weight").data.copy_(rules["0"].matrix)

    u = plain[0](x)
    e = 2 * plain[1:](u).detach().view(samples, 3)
    delta = (e @ rules["3"].matrix).view_as(u) * (1 - u.detach().tanh() ** 2)
    names = dict(plain[0].named_parameters(prefix="0"))
    expected = dict(zip(names, torch.autograd.grad(u, list(names.values()), delta), strict=True))
    below = x.clone().requires_grad_()
    sent = e @ rules["0"].residual["3"].values.double().t()
    if isinstance(layer, nn.Linear):  # units are numbered channel by channel
        sent = sent.view(samples, x.shape[-1], -1).transpose(1, 2)
    expected["input"] = torch.autograd.grad(fed(below), below, delta)[0] + sent.reshape(x.shape)
    torch.testing.assert_close({name: found[name] for name in expected}, expected)
    assert distance(found, gradients(plain, x, squares)) > 1e-3, "control: it is backpropagation"


each_oracle = pytest.mark.parametrize("assert_exact", [assert_direct, assert_dense], ids=["dfa", "dense_fa"])


@each_oracle
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=60)
@given(drawn=convolutions())
def test_a_convolution_of_any_kind(assert_exact: Callable[[nn.Module, Tensor, int], None], drawn: tuple[nn.Module, Tensor]):
    layer, x = drawn
    assert_exact(layer, x, 1 if _unbatched(layer, x) else len(x))


@each_oracle
@settings(max_examples=30)
@given(drawn=linears())
def test_a_linear_layer_of_any_rank(assert_exact: Callable[[nn.Module, Tensor, int], None], drawn: tuple[nn.Module, Tensor]):
    layer, x = drawn
    assert_exact(layer, x, 1 if x.dim() == 1 else len(x))


# State


def drawn_and(rule: str, x: Tensor, seed: int) -> Net:
    net = converted(rule, seed=seed)
    gradients(net, x)
    return net


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
@pytest.mark.parametrize("target_drawn", [True, False])
def test_checkpoints_restore_the_matrices(rule: str, target_drawn: bool) -> None:
    source = drawn_and(rule, images(), seed=1)
    expected = gradients(source, images())
    target = drawn_and(rule, images(), seed=2) if target_drawn else converted(rule, seed=2)
    assert distance(gradients(converted(rule, seed=2), images()), expected) > 0.1, "control: the seeds draw the same"
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same(gradients(target, images()), expected)
    assert list(target.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_checkpoints_made_before_anything_was_drawn_and_plain_ones_keep_the_matrices(rule: str) -> None:
    net = drawn_and(rule, images(), seed=1)
    expected = gradients(net, images())
    for early in (converted(rule, seed=1), Net()):
        net.load_state_dict(early.state_dict(), strict=True)
        assert_same(gradients(net, images()), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Net().load_state_dict(net.state_dict(), strict=True)


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_torch_save], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
@pytest.mark.parametrize("drawn", [True, False])
def test_copies_learn_alike_and_apart(duplicate: Callable[[nn.Module], nn.Module], rule: str, drawn: bool) -> None:
    net = drawn_and(rule, images(), seed=0) if drawn else converted(rule)
    twin = duplicate(net)
    expected = gradients(net, images())
    assert_same(gradients(twin, images()), expected)
    with torch.no_grad():
        for rule_of_twin in feedback_rules(twin).values():
            for tensor in rule_of_twin.state_dict().values():
                tensor.mul_(2)
    assert distance(gradients(twin, images()), expected) > 0.1
    assert_same(gradients(net, images()), expected)
    fahooks.revert(twin)
    assert_same(gradients(twin, images()), gradients(Net(), images()))
    assert_same(gradients(net, images()), expected)


@pytest.mark.parametrize("rule", ["dfa", "dense_fa", "drtp"])
def test_converting_again_keeps_the_matrices_unless_something_is_asked_for(rule: str) -> None:
    net = converted(rule)
    with fahooks.targets(net, labels()):
        expected = gradients(net, images())
    rules = feedback_rules(net)
    fahooks.convert(net, rule)
    assert all(found is rules[name] for name, found in feedback_rules(net).items())
    with fahooks.targets(net, labels()):
        assert_same(gradients(net, images()), expected)
    fahooks.convert(net, rule, gain=2.0)
    with fahooks.targets(net, labels()):
        assert distance(gradients(net, images()), expected) > 0.1


@pytest.mark.parametrize("rule", ["dfa", "dense_fa", "drtp"])
def test_revert_gives_back_the_plain_model(rule: str) -> None:
    net = converted(rule)
    with fahooks.targets(net, labels()):
        gradients(net, images())
    fahooks.revert(net)
    assert_same(gradients(net, images()), gradients(Net(), images()))
    assert list(net.state_dict()) == list(Net().state_dict())
    assert repr(net) == repr(Net())


def test_the_matrices_follow_the_dtype_of_the_error() -> None:
    net = drawn_and("dfa", images(), seed=0)
    expected = gradients(net, images())
    found = gradients(net.float(), images().float())
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(found, {name: gradient.float() for name, gradient in expected.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["dfa", "drtp", "dense_fa"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "sparse"}, "feedback must be one of 'dense', 'channel', 'seeded', got 'sparse'"),
        ({"init": "fan_on"}, "init must be one of"),
        ({"gain": math.inf}, "gain must be a positive number, got inf"),
        ({"gian": 1}, "has no option 'gian' - did you mean 'gain'"),
    ],
)
def test_wrong_options_are_refused(rule: str, options: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(InputError, match=message):
        fahooks.convert(net, rule, **options)
    assert not feedback_layers(net)


@pytest.mark.parametrize("rule", ["dfa", "drtp", "dense_fa"])
@pytest.mark.parametrize("feedback", ["dense", "channel", "seeded"])
def test_the_report_says_where_memory_comes_later(rule: str, feedback: str) -> None:
    net = Net()
    report = fahooks.convert(net, rule, feedback=feedback)
    now = report.memory_bytes
    with fahooks.targets(net, labels()):
        gradients(net, images())
    later = fahooks.convert(net, rule, feedback=feedback)
    grown = later.memory_bytes > now
    assert grown is (feedback != "seeded")
    assert f"{now:,}{'+' if grown else ''} bytes added" in report.total
    assert ("takes memory, in the first backward" in str(report) or "take memory, in the first" in str(report)) is grown


def test_prints_its_options() -> None:
    expected = "DirectFeedbackAlignment(feedback='seeded', init='fan_out', distribution='normal', gain=2)"
    assert repr(DirectFeedbackAlignment(feedback="seeded", gain=2)).startswith(expected[:-1])
