from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks import plugins
from fahooks.rules import DirectRule, FunctionRule, Rule, list_rules, register_rule
from fahooks.rules.base import Call, LearningRule
from fahooks.surgery import feedback_rules

WITH_STATE = [
    ("fa", "matrix"),
    ("usf_init", "matrix"),
    ("frsf", "matrix"),
    ("kp", "matrix"),
    ("wm", "matrix"),
    ("dense_fa", "matrix"),
]


class Counted(Rule):
    """B = step x W, where the step counts the times that it was asked for; a rule with state that is not random."""

    step: Tensor

    def __init__(self, *, start: int = 0) -> None:
        super().__init__()
        self.start = start

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        self.register_buffer("step", weight.new_tensor(self.start))
        self.fans = fan_in, fan_out

    def forward(self, weight: Tensor) -> Tensor:
        self.step += 1
        return self.step * weight


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 3))


def buffers(net: nn.Module, name: str) -> dict[str, Tensor]:
    return {layer: rule.get_buffer(name) for layer, rule in feedback_rules(net).items()}


def test_the_rules_of_the_package_are_listed() -> None:
    paper = {"bp", "sham", "fa", "usf", "usf_init", "usf_sn", "bp_noise", "dfa", "dense_fa"}
    assert paper | {"brsf", "frsf", "drtp", "kp", "wm"} <= set(list_rules())
    for entry in plugins.rules:
        assert entry.summary and entry.paper, f"{entry.name} does not describe itself"


def test_a_rule_that_maps_nothing_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match=r"Empty must implement forward\(weight\)"):
        type("Empty", (Rule,), {})()(torch.ones(2, 2))


def test_a_rule_of_ones_own_by_name_and_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.rules, "_entries", dict(plugins.rules._entries))
    register_rule("test_counted", paper="none")(Counted)
    forms: list[tuple[Any, dict[str, Any]]] = [
        ("test_counted", {"start": 2}),
        (Counted, {"start": 2}),
        ({"rule": "test_counted", "start": 2}, {}),
    ]
    for rule, options in forms:
        layer = nn.Linear(3, 2)
        fahooks.convert(layer, rule, **options)
        x = torch.randn(1, 3, requires_grad=True)
        for step in (3, 4):
            (gradient,) = torch.autograd.grad(layer(x).sum(), x)
            torch.testing.assert_close(gradient, step * layer.weight.sum(0, keepdim=True))
        assert feedback_rules(layer)[""].fans == (3, 2)
    assert "test_counted" in list_rules()


def test_a_function_of_the_weight_is_a_rule() -> None:
    rule = FunctionRule(torch.sign)
    assert torch.equal(rule(torch.tensor([[-2.0, 3.0]])), torch.tensor([[-1.0, 1.0]]))
    assert repr(rule) == "FunctionRule(sign)"


@pytest.mark.parametrize(("rule", "name"), WITH_STATE)
def test_state_depends_on_seed_and_layer_name_alone(rule: str, name: str) -> None:
    whole, part, otherwise = model(), model(), model()
    fahooks.convert(whole, rule, seed=1)
    torch.manual_seed(5)
    fahooks.convert(part, {"3": rule, "1": rule}, seed=1)
    fahooks.convert(otherwise, rule, seed=2)
    expected = buffers(whole, name)
    assert buffers(part, name).keys() == {"1", "3"}
    for layer, found in buffers(part, name).items():
        assert torch.equal(found, expected[layer])
        assert not torch.equal(found, buffers(otherwise, name)[layer]), "control: the seed changes nothing"


def test_layers_of_one_shape_have_different_feedback() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fahooks.convert(net)
    first, second = buffers(net, "matrix").values()
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("rule", "name"), WITH_STATE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_state_is_the_same_in_every_precision(rule: str, name: str, dtype: torch.dtype) -> None:
    single, other = model(), model().to(dtype)
    fahooks.convert(single, rule)
    fahooks.convert(other, rule)
    for layer, state in buffers(other, name).items():
        assert state.dtype == dtype
        assert torch.equal(state, buffers(single, name)[layer].to(dtype))


@pytest.mark.parametrize(("rule", "name"), WITH_STATE)
def test_state_is_the_same_in_every_memory_format(rule: str, name: str) -> None:
    contiguous, channels_last = model(), model().to(memory_format=torch.channels_last)
    fahooks.convert(contiguous, rule)
    fahooks.convert(channels_last, rule)
    state = buffers(channels_last, name)["0"]
    assert torch.equal(state, buffers(contiguous, name)["0"])
    assert state.is_contiguous(memory_format=torch.channels_last) and not state.is_contiguous()


@pytest.mark.parametrize(("rule", "name"), WITH_STATE)
def test_state_is_kept_by_checkpoints(rule: str, name: str) -> None:
    source, target = model(), model()
    fahooks.convert(source, rule, seed=1)
    fahooks.convert(target, rule, seed=2)
    before = copy.deepcopy(buffers(target, name))
    target.load_state_dict(model().state_dict(), strict=True)
    assert all(torch.equal(state, before[layer]) for layer, state in buffers(target, name).items())
    target.load_state_dict(source.state_dict(), strict=True)
    assert all(torch.equal(state, buffers(source, name)[layer]) for layer, state in buffers(target, name).items())
    assert not torch.equal(before["0"], buffers(target, name)["0"]), "control: both seeds draw the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key.replace("matrix", "matirx"), "Missing key.*0.feedback.matrix"),
        (lambda key: key.replace("feedback", "backfeed"), "Unexpected key.*0.backfeed.matrix"),
    ],
    ids=["a wrong buffer of a rule", "a rule where there is none"],
)
def test_a_checkpoint_with_wrong_state_is_refused(change: Any, message: str) -> None:
    net = model()
    fahooks.convert(net, include="0")
    state = {change(key): value for key, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        net.load_state_dict(state, strict=True)


class Halved(DirectRule):
    """Half the true error, whatever the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def around(self, call: Call, input: Tensor) -> Tensor:
        self.calls.append((call.layout, call.unbatched))
        output = call.routed(input.clone())
        assert torch.equal(call.plain(input), output)
        input.register_hook(lambda error: error / 2)
        return output


LAYOUTS: list[tuple[nn.Module, tuple[int, ...], tuple[str, bool]]] = [
    (nn.Linear(4, 3), (2, 4), ("channels last", False)),
    (nn.Linear(4, 3), (4,), ("channels last", False)),
    (nn.Conv1d(4, 3, 2), (2, 4, 5), ("channels first", False)),
    (nn.Conv2d(4, 3, 2), (4, 5, 5), ("channels first", True)),
    (nn.ConvTranspose3d(4, 3, 2), (4, 2, 2, 2), ("channels first", True)),
]


@pytest.mark.parametrize(("layer", "shape", "call"), LAYOUTS, ids=lambda value: type(value).__name__)
def test_a_direct_rule_decides_what_a_call_does(layer: nn.Module, shape: tuple[int, ...], call: tuple[str, bool]) -> None:
    x = torch.randn(shape, requires_grad=True)
    (true,) = torch.autograd.grad(layer(x).square().sum(), x)
    expected = layer(x)
    fahooks.convert(layer, Halved)
    rule: Any = feedback_rules(layer)[""]
    assert torch.equal(layer(x), expected)
    layer(x.detach())
    assert rule.calls == [call], "an input that asks for nothing is none of its business"
    fresh = x.detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(layer(fresh).square().sum(), fresh)[0], true / 2)


def test_a_direct_rule_that_does_nothing_says_what_is_missing() -> None:
    with pytest.raises(plugins.InputError, match=r"'Idle' .* a subclass of DirectRule has a method around\(call, input\)"):
        fahooks.convert(nn.Linear(2, 2), type("Idle", (DirectRule,), {}))


class Learner(LearningRule, FunctionRule):
    """B = W, which is said to learn."""

    def __init__(self) -> None:
        super().__init__(torch.clone)


def test_a_rule_that_is_to_learn_warns_once_where_its_weight_is_trained_without() -> None:
    rule, weight = Learner(), torch.ones(2, 2)
    rule.label, rule.name = "learner", "fc"
    for _ in range(2):
        rule(weight)
    weight.add_(1)
    with pytest.warns(UserWarning, match="learner: fc is trained, and its B does not learn: call fahooks.attach"):
        rule(weight)
    weight.add_(1)
    rule(weight)


def test_a_rule_that_learns_does_not_warn() -> None:
    rule, weight = Learner(), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rule.attach(weight, optimizer)
    for _ in range(3):
        assert torch.equal(rule(weight), weight)
        with torch.no_grad():
            weight.add_(1)
    twin = copy.deepcopy(rule)
    assert rule.attached and not twin.attached, "a copy is attached to no optimizer"
    rule.detach(weight, optimizer)
    assert not rule.attached


def test_a_rule_that_learns_is_refused_where_the_weight_is_computed_in_the_layer() -> None:
    class Standardised(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    net = nn.Sequential(nn.Linear(2, 3), Standardised(3, 2))
    fahooks.convert(net, "kp")
    x = torch.ones(4, 2)
    net(x).sum().backward()
    fahooks.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(
        plugins.InputError, match="kp: '1' computes its weight from its parameter.*: give this layer another rule"
    ):
        net(x).sum().backward()


def test_rules_say_what_their_user_should_know() -> None:
    report = fahooks.convert(model(), {"0": "kp", "1": "dense_fa", "3": "dfa"})
    assert [note.partition(":")[0] for note in report.notes] == ["kp", "dense_fa", "dfa"]
    assert "kp: B learns at optimizer steps, once fahooks.attach(model, optimizer) was called" in str(report)
    assert fahooks.convert(model(), "fa").notes == []


def _unlike(result: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def mine(weight: Tensor) -> Any:
        return result(weight)

    return mine


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda weight: None, r"a NoneType in place of a feedback matrix"),
        (lambda weight: weight.detach().numpy(), r"a ndarray in place of a feedback matrix"),
        (lambda weight: weight.sum(), r"a feedback matrix of shape \(\) and torch.float32"),
        (lambda weight: weight.double(), r"a feedback matrix of shape .* and torch.float64"),
    ],
)
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: nn.Conv2d(3, 3, 1)], ids=["linear", "convolution"])
def test_what_is_no_feedback_matrix_is_refused_by_rule_and_layer(
    make: Callable[[], nn.Module], result: Callable[[Tensor], Any], said: str
) -> None:
    model = nn.Sequential(make(), make())
    fahooks.convert(model, _unlike(result))
    x = torch.randn(2, 3, 4, 4) if isinstance(model[0], nn.Conv2d) else torch.randn(2, 3)
    with pytest.raises(ValueError, match=rf"^rule 'mine' of '1' returned {said}, for a weight of shape .* and torch.float32$"):
        model(x).sum().backward()


def test_a_rule_that_forgets_its_base_is_refused() -> None:
    class Forgetful(fahooks.Rule):
        def __init__(self, share: float = 0.5) -> None:
            self.share = share

        def forward(self, weight: Tensor) -> Tensor:
            return self.share * weight

    with pytest.raises(fahooks.ConversionError, match=r"rule 'Forgetful': the __init__ of Forgetful must begin with super\(\)"):
        fahooks.convert(nn.Linear(2, 2), Forgetful)
