"""What `convert` takes and tells: which layers, which rules, the report, and every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fahooks
from fahooks.plugins import InputError, UnknownName
from fahooks.rules import FeedbackAlignment, Rule, SignSymmetry
from fahooks.rules.base import DirectRule
from fahooks.surgery import ConversionError, feedback_layers, feedback_rules


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.proj = nn.Linear(3, 3)


def model() -> nn.ModuleDict:
    """Layers stem, layer1.0.conv, layer1.0.proj, layer1.1.conv, layer1.1.proj, head."""
    layers = nn.Sequential(Block(), Block())
    return nn.ModuleDict({"stem": nn.Conv2d(3, 3, 3), "layer1": layers, "head": nn.Linear(3, 2)})


ALL = ["stem", "layer1.0.conv", "layer1.0.proj", "layer1.1.conv", "layer1.1.proj", "head"]
CONVS = ["stem", "layer1.0.conv", "layer1.1.conv"]
BLOCKS = ALL[1:5]


def steady(value: object) -> str:
    """What a case is called: without the addresses of functions, which differ from one test worker to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


SELECTORS: list[tuple[Any, list[str]]] = [
    (nn.Conv2d, CONVS),
    (nn.Module, ALL),
    (Block, BLOCKS),
    ("head", ["head"]),
    ("layer1", BLOCKS),
    ("layer1.0", BLOCKS[:2]),
    ("layer1.*.conv", ["layer1.0.conv", "layer1.1.conv"]),
    ("*conv", ["layer1.0.conv", "layer1.1.conv"]),
    ("*", ALL),
    ("layer?.[1-9]", BLOCKS[2:]),
    (re.compile(r"conv$"), ["layer1.0.conv", "layer1.1.conv"]),
    (re.compile(r"^(stem|head)"), ["stem", "head"]),
    (r"re:conv$", ["layer1.0.conv", "layer1.1.conv"]),
    (lambda name, module: getattr(module, "kernel_size", None) == (3, 3), ["stem"]),
    (lambda name, module: len(name) == 4, ["stem", "head"]),
    (["stem", nn.Linear], ["stem", "layer1.0.proj", "layer1.1.proj", "head"]),
    (("head", re.compile("proj")), ["layer1.0.proj", "layer1.1.proj", "head"]),
]
each_selector = pytest.mark.parametrize(("selector", "selected"), SELECTORS, ids=steady)


@each_selector
def test_include_takes_every_kind_of_selector(selector: Any, selected: list[str]) -> None:
    net = model()
    report = fahooks.convert(net, include=selector)
    assert report.converted == selected == list(feedback_layers(net))
    assert report.skipped == {name: "not included" for name in ALL if name not in selected}


@each_selector
def test_exclude_takes_every_kind_of_selector(selector: Any, selected: list[str]) -> None:
    net = model()
    if selected == ALL:
        with pytest.raises(ConversionError, match=r"nothing converted: all 6 layers were left out \(excluded\)"):
            fahooks.convert(net, exclude=selector)
        return
    report = fahooks.convert(net, exclude=selector)
    assert report.converted == [name for name in ALL if name not in selected] == list(feedback_layers(net))
    assert report.skipped == dict.fromkeys(selected, "excluded")


def test_exclude_goes_before_include() -> None:
    assert fahooks.convert(model(), include="layer1", exclude="*.proj").converted == ["layer1.0.conv", "layer1.1.conv"]


@each_selector
def test_a_mapping_takes_every_kind_of_selector(selector: Any, selected: list[str]) -> None:
    for key in selector if isinstance(selector, list | tuple) else [selector]:
        report = fahooks.convert(model(), {key: "usf"})
        assert set(report.converted) <= set(selected)
        assert set(report.skipped.values()) <= {"no pattern matches"}


class Half(Rule):
    """B = factor x W."""

    def __init__(self, *, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def halved(weight: Tensor) -> Tensor:
    return weight / 2


@pytest.mark.parametrize(
    ("rule", "options", "label", "factor"),
    [
        ("sham", {}, "sham", 1),
        (Half, {}, "Half", 0.5),
        (Half, {"factor": 3}, "Half", 3),
        (halved, {}, "halved", 0.5),
        ({"rule": Half, "factor": 2}, {}, "Half", 2),
        ({"rule": Half}, {"factor": 2}, "Half", 2),
        ({"*": {"rule": Half, "factor": 2}}, {}, "Half", 2),
        ({"*": halved}, {}, "halved", 0.5),
        ({"": Half, "*": "fa"}, {}, "Half", 0.5),
    ],
    ids=steady,
)
def test_a_rule_may_be_given_in_every_form(rule: Any, options: dict[str, Any], label: str, factor: float) -> None:
    layer = nn.Linear(3, 2)
    report = fahooks.convert(layer, rule, **options)
    assert [entry.rule for entry in report.layers] == [label]
    x = torch.randn(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, factor * layer.weight.sum(0, keepdim=True))


def test_the_first_pattern_that_matches_decides() -> None:
    net = model()
    rules = {"head": "bp", "layer1.1.*": {"rule": "usf", "scale": 2}, nn.Conv2d: SignSymmetry, "*": "fa"}
    report = fahooks.convert(net, rules)
    assert {entry.name: entry.rule for entry in report.layers} == {
        "stem": "SignSymmetry",
        "layer1.0.conv": "SignSymmetry",
        "layer1.0.proj": "fa",
        "layer1.1.conv": "usf",
        "layer1.1.proj": "usf",
        "head": "",
    }
    assert report.skipped == {"head": "rule bp: left as it is"}
    assert type(net["head"]) is nn.Linear
    scales = {name: rule.factor for name, rule in feedback_rules(net).items() if isinstance(rule, SignSymmetry)}
    assert scales["layer1.1.proj"] == 2 != scales["stem"]
    assert isinstance(feedback_rules(net)["layer1.0.proj"], FeedbackAlignment)


def test_the_order_of_a_mapping_counts() -> None:
    first, last = {"layer1": "fa", "*.proj": "usf"}, {"*.proj": "usf", "layer1": "fa"}
    net = nn.ModuleDict({**model(), "proj": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    fahooks.convert(net, first)
    assert set(feedback_rules(net)["layer1.0.proj"].state_dict()) == {"matrix"}
    fahooks.convert(net, last)
    assert set(feedback_rules(net)["layer1.0.proj"].state_dict()) == set()


def test_a_star_may_find_nothing_left() -> None:
    assert fahooks.convert(nn.Sequential(nn.Linear(2, 2)), {nn.Linear: "usf", "*": "fa"}).layers[0].rule == "usf"


def converted(rule: Any) -> nn.Module:
    net = model()
    fahooks.convert(net, rule)
    return net


def test_the_report_tells_of_every_layer() -> None:
    net = model()
    report = fahooks.convert(net, {"stem": "fa", "layer1.0": "usf_init", "*.proj": "usf", "head": "bp"})
    assert [entry.name for entry in report.layers] == ALL
    assert report.converted == ["stem", "layer1.0.conv", "layer1.0.proj", "layer1.1.proj"]
    assert report.skipped == {"layer1.1.conv": "no pattern matches", "head": "rule bp: left as it is"}
    stem = report.layers[0]
    assert (stem.type, stem.weight_shape, stem.rule, stem.memory_bytes, stem.reason) == ("Conv2d", (3, 3, 3, 3), "fa", 324, None)
    assert report.memory_bytes == sum(b.nbytes for rule in feedback_rules(net).values() for b in rule.buffers()) == 324 + 36 + 36


def test_the_report_prints_as_a_table() -> None:
    report = fahooks.convert(model(), {"stem": "fa", "head": "usf"})
    lines = str(report).splitlines()
    assert len(lines) == len(ALL) + 2
    assert lines[0].split() == ["layer", "type", "weight", "rule", "bytes", "added"]
    assert lines[1].split() == ["stem", "Conv2d", "3x3x3x3", "fa", "324", "converted"]
    assert lines[2].endswith("skipped: no pattern matches")
    assert lines[-1] == "2 layers converted, 4 skipped, 324 bytes added"
    assert len({line.index("Conv2d") for line in lines if "Conv2d" in line}) == 1


def test_the_report_of_a_single_layer_names_the_model() -> None:
    assert "(model)  Linear  2x3" in str(fahooks.convert(nn.Linear(3, 2), "usf"))


def test_the_report_can_be_written_as_json() -> None:
    report = fahooks.convert(model(), {"stem": "fa", "*": "bp"})
    read = json.loads(json.dumps(report.as_dict()))
    assert read["memory_bytes"] == 324
    assert read["layers"][0] == {
        "name": "stem",
        "type": "Conv2d",
        "weight_shape": [3, 3, 3, 3],
        "rule": "fa",
        "memory_bytes": 324,
        "reason": None,
        "grows": False,
    }
    assert [layer["reason"] for layer in read["layers"][1:]] == ["rule bp: left as it is"] * 5


def test_left_out_names_what_was_left_to_backpropagation_as_asked() -> None:
    net = nn.ModuleDict({**model(), "table": nn.Embedding(3, 3)})
    report = fahooks.convert(net, {"head": "bp", "stem": "fa"}, exclude="layer1.0")
    assert report.left_out == [name for name in ALL if name != "stem"]
    assert "table" in report.skipped


def test_what_can_not_be_converted_can_be_left_out_as_asked() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0])

    net, x = Reader(), torch.randn(5, 2, 3)
    report = fahooks.convert(net)
    assert report.left_out == []
    assert not fahooks.audit(net, x, ignore=report.left_out).clean, "control"
    report = fahooks.convert(net, exclude="gru")
    assert (report.left_out, report.converted, report.skipped) == (["gru"], ["head"], {"gru": "excluded"})
    assert fahooks.audit(net, x, ignore=report.left_out).clean


class Weightless(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_parameter("weight", None)


def with_attribute(name: str, value: Any) -> nn.Module:
    layer = nn.Linear(2, 2)
    setattr(layer, name, value)
    return layer


def with_integers() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return layer


def with_sparse_weight() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.eye(2).to_sparse())
    return layer


UNCONVERTIBLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "embedding": (lambda: nn.Embedding(3, 2), "a look-up"),
    "embedding bag": (lambda: nn.EmbeddingBag(3, 2), "a look-up"),
    "lstm": (lambda: nn.LSTM(2, 2), "recurrent"),
    "gru cell": (lambda: nn.GRUCell(2, 2), "recurrent"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex weights are not supported"),
    "integers": (with_integers, "integer weights are not supported"),
    "sparse": (with_sparse_weight, "sparse weights are not supported"),
    "complex, parametrized": (
        lambda: parametrize.register_parametrization(nn.Linear(2, 2, dtype=torch.complex64), "weight", nn.Identity()),
        "complex weights are not supported",
    ),
    "no weight": (Weightless, "it has no weight"),
    "no units": (lambda: nn.Linear(2, 0), "its weight is empty"),
    "a forward of the object": (lambda: with_attribute("forward", lambda x: x), "a forward of its own"),
    "an attribute in the way": (lambda: with_attribute("feedback", 1), "an attribute named 'feedback' of its own"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "reason"), UNCONVERTIBLE.values(), ids=UNCONVERTIBLE)
def test_what_can_not_be_converted_is_named_with_its_reason(make: Callable[[], nn.Module], reason: str) -> None:
    odd = make()
    kind = type(odd)
    net = nn.ModuleDict({"plain": nn.Linear(2, 2), "odd": odd})
    report = fahooks.convert(net)
    assert report.converted == ["plain"]
    assert reason in report.skipped["odd"]
    assert net["odd"] is odd and type(odd) is kind
    assert f"skipped: {report.skipped['odd']}" in str(report)
    with pytest.raises(ConversionError, match="nothing converted"):
        fahooks.convert(nn.ModuleDict({"odd": make()}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "usf_in"}, UnknownName, r"no rule is named 'usf_in' - did you mean 'usf_init'"),
        ({"rule": {"*": "fb"}}, UnknownName, r"no rule is named 'fb' - did you mean '.*fa'"),
        ({"rule": {"hed": "fa"}}, ConversionError, r"rule: 'hed' matches none of the 6 layers - did you mean 'head'\?"),
        ({"include": "layer2.*"}, ConversionError, r"include: 'layer2\.\*' matches none of the 6 layers"),
        ({"exclude": "steam"}, ConversionError, r"exclude: 'steam' matches none of the 6 layers - did you mean 'stem'\?"),
        ({"include": "xyz"}, ConversionError, r"layers are named like 'stem', 'layer1.0.conv', 'layer1.0.proj'"),
        ({"include": nn.Conv3d}, ConversionError, r"include: 'Conv3d' matches none of the 6 layers"),
        ({"include": re.compile("xyz")}, ConversionError, r"include: .*xyz.* matches none of the 6 layers"),
        ({"include": ["stem", "xyz"]}, ConversionError, r"include: 'xyz' matches none"),
        ({"include": lambda name, module: False}, ConversionError, r"include: '<lambda>' matches none"),
        ({"include": 3}, ConversionError, r"include: expected a name pattern, .* got 3"),
        ({"exclude": [None]}, ConversionError, r"exclude: expected a name pattern, .* got None"),
        ({"rule": {"stem": "fa"}, "exclude": "stem"}, ConversionError, r"nothing converted: all 6 layers .*excluded; no pattern"),
        ({"rule": "fa", "gian": 2}, InputError, r"rule 'fa' has no option 'gian' - did you mean 'gain'"),
        ({"rule": {"*": {"rule": "fa", "size": 2}}}, InputError, r"rule 'fa' has no option 'size'"),
        ({"rule": Half, "size": 2}, InputError, r"rule 'Half' has no option 'size'"),
        ({"rule": Half, "factor": "much"}, InputError, r"rule 'Half': factor must be a number \(got 'much'\)"),
        ({"rule": {"*": {"rule": "fa", "gain": "much"}}}, InputError, r"rule 'fa': gain must be a number \(got 'much'\)"),
        (
            {"rule": "dfa", "at": 3},
            InputError,
            r"rule 'dfa': at must be a string or a list \(got 3\)|at must be a list or a string",
        ),
        ({"rule": "dfa", "output": [0, 1]}, InputError, r"rule 'dfa': output must be an integer or a string \(got \[0, 1\]\)"),
        ({"rule": Rule}, ConversionError, r"rule 'Rule' does not say what it sends back"),
        ({"rule": DirectRule}, ConversionError, r"rule 'DirectRule' does not say what it sends back"),
        ({"seed": "a"}, InputError, r"seed must be a whole number, got 'a'"),
        ({"seed": True}, InputError, r"seed must be a whole number, got True"),
        ({"exclude": "re:("}, ConversionError, r"exclude: 're:\(' is no regular expression: missing \)"),
        ({"rule": {"re:(": "fa"}}, ConversionError, r"rule: 're:\(' is no regular expression: missing \)"),
        ({"include": "re:^xyz$"}, ConversionError, r"include: .*xyz.* matches none of the 6 layers"),
        ({"rule": halved, "gain": 2}, ConversionError, r"a function has no options, got gain"),
        ({"rule": {"*": "fa"}, "gain": 2}, ConversionError, r"options gain belong beside a rule, as \{pattern: .*\}, where"),
        ({"rule": {}}, ConversionError, r"the mapping of rules is empty"),
        (
            {"rule": {"*": "fa", "head": "bp"}},
            ConversionError,
            r"^rule: 'head' decides for no layer: '\*' before it takes all that it matches; put it first, or leave it out$",
        ),
        (
            {"rule": {"layer1.0": "fa", "stem": "fa", "layer1.1": "usf", "layer1.*.conv": "bp"}},
            ConversionError,
            r"'layer1.\*.conv' decides for no layer: 'layer1.0' and 'layer1.1' before it take all that it matches",
        ),
        (
            {"rule": {nn.Conv2d: "fa", re.compile("conv"): "bp"}},
            ConversionError,
            r"decides for no layer: 'Conv2d' before it takes",
        ),
        ({"rule": {"*": {"gain": 2}}}, ConversionError, r"expected \{'rule': name, .*\}, got \{'gain': 2\}"),
        ({"rule": Half()}, ConversionError, r"got the module Half: pass its class"),
        ({"rule": nn.Linear(2, 2)}, ConversionError, r"got the module Linear: pass its class"),
        ({"rule": 3}, ConversionError, r"rule must be a name, a Rule class, a function W -> B or a mapping of these, got 3"),
        ({"rule": None}, ConversionError, r"rule must be a name, .* got None"),
        ({"rule": nn.Linear}, ConversionError, r"rule must be a name, .* got the class Linear, which is no Rule"),
    ],
    ids=steady,
)
def test_wrong_arguments_are_refused_in_one_line(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    net = model()
    with pytest.raises(error, match=message) as raised:
        fahooks.convert(net, **arguments)
    assert isinstance(raised.value, InputError)
    assert "\n" not in str(raised.value)
    assert not feedback_layers(net)


@pytest.mark.parametrize(
    "call",
    [
        fahooks.convert,
        fahooks.revert,
        lambda thing: fahooks.backprop(thing).__enter__(),
        fahooks.audit,
        lambda thing: fahooks.attach(thing, torch.optim.SGD(nn.Linear(2, 2).parameters())),
        lambda thing: fahooks.probe(thing).__enter__(),
        lambda thing: fahooks.targets(thing, torch.zeros(1)).__enter__(),
    ],
)
@pytest.mark.parametrize("thing", [3, "timm/resnet18", nn.Linear, None], ids=steady)
def test_what_is_no_model_is_refused_at_the_door(call: Callable[[Any], Any], thing: Any) -> None:
    with pytest.raises(InputError, match=r"^the model must be a torch.nn.Module, got "):
        call(thing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "nothing to convert: the model has no linear or convolution layer"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), r"layer '1' has no shape yet: run one batch"),
        (lambda: nn.LazyConv2d(2, 3), r"layer '' has no shape yet: run one batch"),
        (lambda: nn.Linear(2, 2, device="meta"), r"layer '' is on the meta device: materialise"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2, bias=False)).to("meta")), "layer '0' is on the meta"),
        (lambda: nn.MultiheadAttention(4, 2, device="meta"), "layer 'in_proj_weight' is on the meta device"),
    ],
)
def test_models_that_are_not_ready_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    net = make()
    with pytest.raises(ConversionError, match=message):
        fahooks.convert(net)
    assert not feedback_layers(net)


def test_a_lazy_layer_converts_once_it_has_seen_a_batch() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    net(torch.randn(1, 4))
    assert fahooks.convert(net).converted == ["0", "2"]


def test_a_lazy_layer_that_is_left_out_may_stay_lazy() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    report = fahooks.convert(net, exclude="1")
    assert report.converted == ["0"] and report.layers[1].weight_shape == ()
    assert net(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_scripted_models_are_refused() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match="the model is a torch.jit.ScriptModule: convert before torch.jit.script"):
        fahooks.convert(scripted)
    with pytest.raises(ConversionError, match="0 is a torch.jit.ScriptModule"):
        fahooks.convert(nn.Sequential(scripted))
