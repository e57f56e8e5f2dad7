from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.plugins import InputError
from fahooks.rules.passes import Passes, WholeModelRule, chosen, inject, passes_of
from fahooks.surgery import feedback_rules

Named = namedtuple("Named", ["logits", "aux"])


@dataclasses.dataclass
class Record:
    logits: Tensor
    aux: Tensor
    note: str = "kept"


class Thing:
    def __init__(self, logits: Tensor, aux: Tensor) -> None:
        self.logits = logits
        self.aux = aux


Get = Callable[[Any], Tensor]

OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int | str, Get, Get]] = {
    "tuple": (lambda a, b: (a, b), 0, lambda o: o[0], lambda o: o[1]),
    "list": (lambda a, b: [a, b], 0, lambda o: o[0], lambda o: o[1]),
    "namedtuple by index": (Named, 0, lambda o: o.logits, lambda o: o.aux),
    "namedtuple by name": (Named, "logits", lambda o: o.logits, lambda o: o.aux),
    "dict": (lambda a, b: {"logits": a, "aux": b}, "logits", lambda o: o["logits"], lambda o: o["aux"]),
    "ordered dict": (lambda a, b: OrderedDict(x=b, y=a), "y", lambda o: o["y"], lambda o: o["x"]),
    "dataclass": (Record, "logits", lambda o: o.logits, lambda o: o.aux),
    "object": (Thing, "logits", lambda o: o.logits, lambda o: o.aux),
}

each_output = pytest.mark.parametrize(("make", "option", "first", "second"), OUTPUTS.values(), ids=OUTPUTS)


@each_output
def test_one_tensor_of_an_output_is_chosen_and_replaced(make: Any, option: int | str, first: Get, second: Get) -> None:
    logits, aux, other = torch.zeros(2), torch.ones(2), torch.randn(2)
    output = make(logits, aux)
    tensor, replaced = chosen(output, option, "dfa")
    assert tensor is logits
    changed = replaced(other)
    assert type(changed) is type(output)
    assert first(changed) is other and second(changed) is aux
    assert first(output) is logits, "the output itself is left as it is"


def test_of_a_single_tensor_nothing_needs_to_be_chosen() -> None:
    logits, classes = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    for output in (logits, (logits,), (classes, logits), {"classes": classes, "logits": logits, "name": "x"}, [None, logits]):
        assert chosen(output, None, "dfa")[0] is logits


@pytest.mark.parametrize(
    ("output", "option", "message"),
    [
        ((torch.ones(1), torch.ones(1)), None, r"dfa: the model returns several tensors, or none \(0, 1\): .* option output="),
        ({"a": torch.ones(1), "b": torch.ones(1)}, None, r"\('a', 'b'\)"),
        (Record(torch.ones(1), torch.ones(1)), None, r"\('logits', 'aux'\)"),
        ("text", None, r"\(none\)"),
        ({"logits": torch.ones(1)}, "logit", "no tensor output='logit'; there are 'logits'$"),
        ((torch.ones(1), torch.ones(1)), "0", "no tensor output='0'; there are 0, 1$"),
        ((torch.ones(1), torch.ones(1)), -1, "no tensor output=-1; there are 0, 1$"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, 0, "no tensor output=0; there are 'a', 'b'$"),
        (Record(torch.ones(1), torch.ones(1)), "note", "no tensor output='note'"),
        ((torch.ones(1),), 1, "no tensor output=1"),
        (torch.ones(1), "logits", "no tensor output='logits'"),
    ],
)
def test_an_unclear_choice_is_refused(output: Any, option: int | str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(output, option, "dfa")


def test_injection_sends_of_the_error_and_lets_the_error_pass() -> None:
    carrier, target = torch.randn(3, 2, requires_grad=True), torch.randn(5, requires_grad=True)
    sent: list[Tensor] = []

    def send(error: Tensor) -> Tensor:
        sent.append(error)
        return torch.arange(5) * error.sum()

    rule: Any = None
    output = inject(carrier, target, send, rule)
    assert torch.equal(output, carrier)
    error = torch.randn(3, 2)
    output.backward(error)
    assert carrier.grad is not None and torch.equal(carrier.grad, error) and torch.equal(sent[0], error)
    torch.testing.assert_close(target.grad, torch.arange(5) * error.sum())


def test_nothing_is_sent_to_what_asks_for_nothing() -> None:
    rule: Any = None
    carrier = torch.randn(3, requires_grad=True)

    def refuse(error: Tensor) -> Tensor:
        raise RuntimeError("not asked for")

    inject(carrier, torch.randn(2), refuse, rule).sum().backward()
    assert carrier.grad is not None
    with pytest.raises(RuntimeError, match="not asked for"):
        inject(carrier, torch.randn(2, requires_grad=True), refuse, rule).sum().backward()


class Net(nn.Module):
    """Two layers, which a test may do things between."""

    def __init__(self, between: Callable[[Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def converted(rule: str = "dfa", between: Callable[[Tensor], Any] = torch.tanh, **options: Any) -> Net:
    net = Net(between)
    fahooks.convert(net, rule, **options)
    return net


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_a_layer_called_by_itself_is_refused_with_what_to_do(rule: str) -> None:
    net = converted(rule)
    message = (
        f"{rule}: layer 'last' was called outside of the forward pass of the model .*: call that model, or convert the module"
    )
    with pytest.raises(InputError, match=message):
        net.last(torch.ones(2, 5, requires_grad=True))
    net(X)
    with pytest.raises(InputError, match=message):
        net.last(torch.ones(2, 5, requires_grad=True))
    assert net.last(torch.ones(2, 5)).shape == (2, 3), "control: nothing asks for an error here"
    fahooks.revert(net)
    net.last(torch.ones(2, 5, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_a_forward_pass_that_raises_leaves_nothing_behind(rule: str) -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("between")

    net = converted(rule)
    expected = gradients(net, X)
    net.between = lambda x: fail(net.last(x))
    with pytest.raises(KeyError, match="between"):
        net(X.repeat(3, 1))
    (passes,) = passes_of(net)
    assert passes.current is None
    net.between = torch.tanh
    assert_same(gradients(net, X), expected)


def test_a_forward_pass_without_gradient_notes_nothing() -> None:
    net = converted()
    plain = Net()
    with torch.no_grad():
        output = net(X)
    assert torch.equal(output, plain(X)) and output.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(net(X), plain(X))
    assert feedback_rules(net)["last"].matrix.values is None
    gradients(net, X)
    assert feedback_rules(net)["last"].matrix.values is not None


def test_the_batch_is_that_of_the_first_tensor_also_by_keyword() -> None:
    net = converted()
    expected = gradients(net, X)
    net.zero_grad()
    net(x=X).square().sum().backward()
    assert_same({name: parameter.grad for name, parameter in net.named_parameters()}, expected)


def test_a_number_beside_the_batch_is_not_the_batch() -> None:
    class Timed(Net):
        def forward(self, time: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x) * time

    torch.manual_seed(0)
    net = Timed()
    fahooks.convert(net, "dfa")
    whole, parts = net(torch.tensor(2.0), X), [net(torch.tensor(2.0), sample) for sample in X.split(1)]
    found = torch.autograd.grad(whole.square().sum(), net.first.weight)
    expected = torch.autograd.grad(torch.cat(parts).square().sum(), net.first.weight)
    torch.testing.assert_close(found, expected)


def test_a_model_of_indices_is_a_batch_of_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fahooks.convert(net, "dfa")
    whole = gradients(net, torch.tensor([1, 2, 5]))
    parts = [gradients(net, torch.tensor([index])) for index in (1, 2, 5)]
    torch.testing.assert_close(whole, {name: sum(part[name] for part in parts) for name in whole})


def test_an_output_without_the_batch_is_refused() -> None:
    whole = nn.Sequential(Net(), nn.Flatten(0))
    fahooks.convert(whole, "dfa")
    with pytest.raises(InputError, match=r"output has shape \(18,\), for a batch of 6: its first dimension must"):
        whole(X).sum().backward()


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_an_input_that_is_overwritten_is_refused(rule: str) -> None:
    net = converted(rule)
    net.between = lambda x: (net.last(h := torch.tanh(x)), h.mul_(2))[1]
    with pytest.raises(InputError, match=f"{rule}: the tensor at 'last' was overwritten before the pass ended"):
        net(X)


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
def test_revert_and_other_conversions_leave_no_hook(rule: str) -> None:
    net = converted(rule)
    (passes,) = passes_of(net)
    assert len(net._forward_hooks) == len(net._forward_pre_hooks) == 1
    fahooks.convert(net, rule)
    assert len(passes_of(net)) == len(net._forward_hooks) == len(net._forward_pre_hooks) == 1
    assert passes_of(net) != [passes]
    for undo in (lambda: fahooks.convert(net, "fa"), lambda: fahooks.revert(net)):
        undo()
        assert not passes_of(net) and not net._forward_hooks and not net._forward_pre_hooks
        assert not net._forward_hooks_always_called and not net._forward_pre_hooks_with_kwargs
        fahooks.convert(net, rule)


def test_hooks_of_others_stay() -> None:
    net, called = converted(), []
    net.register_forward_hook(lambda *_: called.append("after"))
    net.register_forward_pre_hook(lambda *_: called.append("before"))
    fahooks.revert(net)
    net(X)
    assert called == ["before", "after"]


def test_a_part_that_was_converted_is_a_model_of_its_own() -> None:
    class Wrapper(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    net = converted()
    expected = gradients(net, X)
    found = gradients(Wrapper(net), X)
    assert_same({name.removeprefix("body."): gradient for name, gradient in found.items()}, expected)
    fahooks.revert(wrapper := Wrapper(net))
    assert not passes_of(wrapper)


def test_a_rule_of_ones_own_gets_the_passes_of_its_model() -> None:
    class OnlyOutput(WholeModelRule):
        """Doubles the error at the model's output, for what it reaches by backpropagation."""

        def around(self, call: Any, input: Tensor) -> Tensor:
            self.visit(input, call.layout)
            return call.plain(input)

        def finish(self, visit: Any, output: Any, current: Any) -> Any:
            output.register_hook(lambda error: 2 * error)
            return output

    net, plain = Net(), Net()
    fahooks.convert(net, OnlyOutput)
    torch.testing.assert_close(gradients(net, X), {name: 2 * gradient for name, gradient in gradients(plain, X).items()})


def labels_of(net: nn.Module) -> Tensor | None:
    (passes,) = passes_of(net)
    return None if passes.targets is None else passes.targets.labels


def test_targets_nest_and_are_restored_when_the_body_raises() -> None:
    net = converted("drtp")
    outer, inner = torch.tensor([0]), torch.tensor([1])
    with fahooks.targets(net, outer):
        assert labels_of(net) is outer
        with pytest.raises(KeyError), fahooks.targets(net, inner):
            assert labels_of(net) is inner
            raise KeyError
        assert labels_of(net) is outer
    assert labels_of(net) is None


def test_targets_that_are_no_tensor_are_refused() -> None:
    labels: Any = [0, 1]
    with pytest.raises(InputError, match="scale must be a number or a tensor, got 'a'"):
        fahooks.targets(converted("drtp"), torch.zeros(3), scale="a").__enter__()  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="targets must be a tensor of class indices or values, got a list"):
        with fahooks.targets(converted("drtp"), labels):
            raise RuntimeError("the body ran")


def test_targets_of_other_models_are_no_matter() -> None:
    with fahooks.targets(Net(), torch.tensor([0])):
        Net()(X)
    net = converted("drtp")
    with fahooks.targets(nn.ModuleList([net]), torch.tensor([0])):
        assert labels_of(net) is not None


def test_a_backward_pass_has_the_targets_of_its_own_forward_pass() -> None:
    net = converted("drtp")
    separately = []
    for labels in (torch.zeros(6).long(), torch.ones(6).long()):
        with fahooks.targets(net, labels):
            separately.append(gradients(net, X))
    outputs = []
    for labels in (torch.zeros(6).long(), torch.ones(6).long()):
        with fahooks.targets(net, labels):
            outputs.append(net(X))
    for output, expected in zip(outputs, separately, strict=True):
        net.zero_grad()
        output.square().sum().backward()
        assert_same({name: parameter.grad for name, parameter in net.named_parameters()}, expected)
    assert not torch.allclose(separately[0]["first.weight"], separately[1]["first.weight"]), "control: the targets do not matter"


def test_a_copy_watches_its_own_passes() -> None:
    net = converted()
    twin = copy.deepcopy(net)
    assert isinstance(feedback_rules(twin)["last"].passes, Passes)
    assert passes_of(twin) == [feedback_rules(twin)["last"].passes] != passes_of(net)
    fahooks.revert(twin)
    assert not passes_of(twin) and passes_of(net)
    gradients(net, X)


def test_a_layer_whose_input_has_not_the_batch_is_refused_by_name() -> None:
    class Table(nn.Module):
        """Adds a bias that is made of coordinates, as relative positions are."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.bias(torch.ones(5, 2)).sum(0)

    net = Table()
    fahooks.convert(net, "dfa")
    with pytest.raises(InputError, match=r"dfa: at 'bias.1', a tensor of shape \(5, 4\) can not be divided .*exclude="):
        net(X)
    fahooks.convert(net, "dfa", exclude="bias")
    assert gradients(net, X).keys() == dict(net.named_parameters()).keys()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        return {"main": self.main(hidden), "aux": self.aux(hidden)}


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_a_choice_that_the_loss_does_not_use_is_told_before_the_second_step(rule: str) -> None:
    net, x = TwoHeads(), torch.randn(6, 4)
    fahooks.convert(net, rule, output="main")
    with fahooks.targets(net, torch.zeros(6, dtype=torch.int64)):
        net(x)["aux"].sum().backward()
        assert net.body.weight.grad is None
        with pytest.warns(UserWarning, match=f"^{rule}: its layers learn nothing so far: .* output='main' .*, but 'aux'"):
            net(x)["aux"].sum().backward()
        net(x)  # once is enough: warnings are errors here


def test_a_pass_without_gradients_tells_nothing_of_a_choice() -> None:
    net, x = TwoHeads(), torch.randn(6, 4)
    fahooks.convert(net, "dfa", output="main")
    for _ in range(3):
        output = net(x)
        with torch.no_grad():
            net(x)
        output["main"].sum().backward()
    assert net.body.weight.grad is not None


def test_a_choice_that_any_loss_uses_will_do() -> None:
    net, x = TwoHeads(), torch.randn(6, 4)
    fahooks.convert(net, "dfa", output="main")
    for used in (("aux", "main"), ("aux",), ("aux",)):
        output = net(x)
        for name in used:  # a backward pass for each
            output[name].sum().backward()
    net(x)
    assert net.body.weight.grad is not None
