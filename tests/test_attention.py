"""nn.MultiheadAttention and the transformers made of it, which use their projections' weights functionally."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fahooks
from fahooks import plugins
from fahooks.reference import oracle
from fahooks.surgery import feedback_layers, feedback_rules

Learn = Callable[..., Any]
Make = Callable[[], nn.Module]

RULES = ["fa", "usf", "usf_init", "usf_sn"]
PACKED = ["in_proj_weight", "out_proj"]
SEPARATE = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]


def signals(*widths: int, lengths: Sequence[int] = (), batch_first: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    shapes = [(length, 2, width) for length, width in zip(lengths or [5] * len(widths), widths, strict=True)]
    return tuple(torch.randn(n, length, w) if batch_first else torch.randn(length, n, w) for length, n, w in shapes)


class SelfAttention(nn.MultiheadAttention):
    """Query, key and value are one signal."""

    def forward(self, signal: Tensor, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(signal, signal, signal, **options)


class MemoryAttention(nn.MultiheadAttention):
    """Key and value are one signal: the packed projection is split in two."""

    def forward(self, query: Tensor, memory: Tensor, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(query, memory, memory, **options)


CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDED = torch.tensor([[False] * 4 + [True], [False] * 5])

# A module, what it is called with, and the names of the weights that are converted.
ATTENTION: dict[str, tuple[Make, tuple[Tensor, ...], dict[str, Any], list[str]]] = {
    "self": (lambda: SelfAttention(8, 2), signals(8), {}, PACKED),
    "self, no bias": (lambda: SelfAttention(8, 2, bias=False), signals(8), {}, PACKED),
    "self, batch first": (lambda: SelfAttention(8, 2, batch_first=True), signals(8, batch_first=True), {}, PACKED),
    "self, unbatched": (lambda: SelfAttention(8, 2), (signals(8)[0][:, 0],), {}, PACKED),
    "self, without weights": (lambda: SelfAttention(8, 2), signals(8), {"need_weights": False}, PACKED),
    "self, weights of each head": (lambda: SelfAttention(8, 2), signals(8), {"average_attn_weights": False}, PACKED),
    "self, masks": (lambda: SelfAttention(8, 2), signals(8), {"attn_mask": CAUSAL, "key_padding_mask": PADDED}, PACKED),
    "self, bias_k and zero attention": (
        lambda: SelfAttention(8, 2, add_bias_kv=True, add_zero_attn=True),
        signals(8),
        {},
        PACKED,
    ),
    "self, dropout": (lambda: SelfAttention(8, 2, dropout=0.3), signals(8), {}, PACKED),
    "memory": (lambda: MemoryAttention(8, 2), signals(8, 8, lengths=(5, 3)), {}, PACKED),
    "three signals": (lambda: nn.MultiheadAttention(8, 2), signals(8, 8, 8, lengths=(5, 3, 3)), {}, PACKED),
    "other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=7),
        signals(8, 6, 7, lengths=(5, 3, 3)),
        {"need_weights": False},
        SEPARATE,
    ),
}
each_attention = pytest.mark.parametrize(("make", "inputs", "options", "names"), ATTENTION.values(), ids=ATTENTION)

TRANSFORMERS: dict[str, tuple[Make, tuple[Tensor, ...]]] = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12), signals(8)),
    "encoder layer, batch and norm first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True),
        signals(8, batch_first=True),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2),
        signals(8, batch_first=True),
    ),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(8, 2, 12), signals(8, 8, lengths=(5, 3))),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True), signals(8, 8, lengths=(5, 3), batch_first=True)),
}
each_transformer = pytest.mark.parametrize(("make", "inputs"), TRANSFORMERS.values(), ids=TRANSFORMERS)


def pair(make: Make, rule: Any = "fa", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make().to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.std() == 0:
                parameter.normal_()
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule, **options)
    return plain, converted


def cast(inputs: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in inputs]


def assert_oracle(learn: Learn, plain: nn.Module, converted: nn.Module, *inputs: Tensor, **options: Any) -> None:
    surrogate = copy.deepcopy(plain)
    rules = feedback_rules(converted)
    expected = learn(surrogate, *inputs, around=lambda: oracle(surrogate, rules), **options)
    learn(converted, *inputs, **options).assert_oracle(expected, learn(plain, *inputs, **options))


@each_attention
@pytest.mark.parametrize("rule", RULES)
def test_attention_equals_the_oracle(
    learn: Learn, make: Make, inputs: tuple[Tensor, ...], options: dict[str, Any], names: list[str], rule: str
) -> None:
    plain, converted = pair(make, rule)
    assert list(feedback_rules(converted)) == names
    assert_oracle(learn, plain, converted, *cast(inputs), **options)


@each_attention
def test_every_projection_sends_the_error_through_its_own_feedback(
    learn: Learn, make: Make, inputs: tuple[Tensor, ...], options: dict[str, Any], names: list[str]
) -> None:
    _, converted = pair(make)
    before = learn(converted, *cast(inputs), **options)
    for name, rule in feedback_rules(converted).items():
        rule.get_buffer("matrix").neg_()
        assert learn(converted, *cast(inputs), **options).distance(before) > 0.01, f"{name} is not routed"
        rule.get_buffer("matrix").neg_()
    learn(converted, *cast(inputs), **options).assert_same_bits(before)


@each_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sham_attention_is_backpropagation_to_the_last_bit(
    learn: Learn, make: Make, inputs: tuple[Tensor, ...], options: dict[str, Any], names: list[str], dtype: torch.dtype
) -> None:
    plain, converted = pair(make, "sham", dtype)
    assert list(feedback_rules(converted)) == names
    learn(converted, *cast(inputs, dtype), **options).assert_same_bits(learn(plain, *cast(inputs, dtype), **options))


@each_attention
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_attention_keeps_its_bits(
    make: Make,
    inputs: tuple[Tensor, ...],
    options: dict[str, Any],
    names: list[str],
    training: bool,
    frozen: bool,
    enabled: bool,
) -> None:
    results: list[Any] = []
    for model in pair(make, "fa", torch.float32):
        model.train(training).requires_grad_(not frozen)
        torch.manual_seed(0)
        with torch.set_grad_enabled(enabled):
            results.append(model(*inputs, **options))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@each_transformer
@pytest.mark.parametrize("rule", ["fa", "usf_sn"])
def test_transformers_equal_the_oracle(learn: Learn, make: Make, inputs: tuple[Tensor, ...], rule: str) -> None:
    plain, converted = pair(make, rule)
    assert_oracle(learn, plain, converted, *cast(inputs))


@each_transformer
def test_sham_transformers_are_backpropagation_to_the_last_bit(learn: Learn, make: Make, inputs: tuple[Tensor, ...]) -> None:
    plain, converted = pair(make, "sham", torch.float32)
    learn(converted, *inputs).assert_same_bits(learn(plain, *inputs))


@each_transformer
def test_transformers_keep_the_bits_of_the_fast_path(
    monkeypatch: pytest.MonkeyPatch, make: Make, inputs: tuple[Tensor, ...]
) -> None:
    plain, converted = (model.eval() for model in pair(make, "fa", torch.float32))
    taken: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        fast = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, fast=fast, name=name: taken.append(name) or fast(*args))
    with torch.no_grad():
        expected = plain(*inputs)
        by_plain = list(taken)
        taken.clear()
        found = converted(*inputs)
    assert torch.equal(found, expected)
    assert taken == by_plain
    assert taken or not isinstance(plain, nn.TransformerEncoder), "control: the fast path was never taken"


@pytest.mark.parametrize("rule", ["fa", "usf_init", "usf_sn"])
def test_revert_gives_back_plain_attention(learn: Learn, rule: str) -> None:
    plain, model = pair(lambda: SelfAttention(8, 2), rule)
    fahooks.revert(model)
    assert repr(model) == repr(plain)
    assert [set(vars(module)) for module in model.modules()] == [set(vars(module)) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    learn(model, *cast(signals(8))).assert_same_bits(learn(plain, *cast(signals(8))))


def test_attention_survives_copies_and_checkpoints(learn: Learn) -> None:
    plain, model = pair(lambda: nn.MultiheadAttention(8, 2))
    inputs = cast(signals(8, 8, 8))
    expected = learn(model, *inputs)
    learn(copy.deepcopy(model), *inputs).assert_same_bits(expected)
    model.load_state_dict(plain.state_dict(), strict=True)
    learn(model, *inputs).assert_same_bits(expected)
    _, other = pair(lambda: nn.MultiheadAttention(8, 2), seed=1)
    assert learn(other, *inputs).distance(expected) > 0.01
    assert {"feedback.in_proj_weight.matrix", "out_proj.feedback.matrix"} < set(model.state_dict())
    other.load_state_dict(model.state_dict(), strict=True)
    learn(other, *inputs).assert_same_bits(expected)


def test_converting_attention_again_changes_nothing() -> None:
    _, model = pair(lambda: SelfAttention(8, 2))
    rules = feedback_rules(model)
    fahooks.convert(model)
    assert all(rule is rules[name] for name, rule in feedback_rules(model).items())
    fahooks.convert(model, "usf")
    assert not any(rule is rules[name] for name, rule in feedback_rules(model).items())


@pytest.mark.parametrize("include", PACKED)
def test_projections_are_converted_one_by_one(learn: Learn, include: str) -> None:
    plain, converted = pair(lambda: SelfAttention(8, 2), include=include)
    assert list(feedback_rules(converted)) == [include]
    assert_oracle(learn, plain, converted, *cast(signals(8)))


def test_backprop_gives_true_gradients_of_attention(learn: Learn) -> None:
    plain, converted = pair(lambda: SelfAttention(8, 2))
    with fahooks.backprop(converted):
        learn(converted, *cast(signals(8))).assert_same_bits(learn(plain, *cast(signals(8))))
    assert learn(converted, *cast(signals(8))).distance(learn(plain, *cast(signals(8)))) > 0.01


@pytest.mark.parametrize("rule", ["sham", "fa", "usf_sn"])
def test_attention_under_autocast(learn: Learn, rule: str) -> None:
    plain, converted = pair(lambda: MemoryAttention(8, 2), rule, torch.float32)
    inputs = signals(8, 8, lengths=(5, 3))

    def half() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    found, true = learn(converted, *inputs, around=half), learn(plain, *inputs, around=half)
    torch.testing.assert_close(found.outputs, true.outputs, rtol=0, atol=0)
    if rule == "sham":
        found.assert_same_bits(true)
    else:
        exact = learn(converted, *inputs)
        assert found.distance(exact) < 0.05 < found.distance(true)


class Packed(nn.Module):
    """Slices, chunks and splits a weight of its own, as an adapter allows."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(6, 3))

    def forward(self, signal: Tensor) -> Tensor:
        first, second = self.packed.chunk(2)
        third, fourth = self.packed.split([4, 2])
        left = F.linear(F.linear(signal, first), second) @ signal.mT
        right = F.linear(F.linear(signal, self.packed[:3]), self.packed[3:])
        return left.sum(-1, keepdim=True) + right + F.linear(signal, fourth).sum() * F.linear(signal, third)[..., :3]


def test_every_part_of_a_packed_weight_sends_the_error_through_its_part_of_the_feedback(
    monkeypatch: pytest.MonkeyPatch, learn: Learn
) -> None:
    monkeypatch.setattr(plugins.adapters, "_entries", dict(plugins.adapters._entries))
    fahooks.register_adapter(f"{Packed.__module__}.Packed", summary="none")(lambda module: ["packed"])
    for rule in RULES:
        plain, converted = pair(Packed, rule)
        assert list(feedback_rules(converted)) == ["packed"]
        assert_oracle(learn, plain, converted, torch.randn(2, 4, 3).double())


# Normalised projections, and the same attention with the normalised weights as plain ones.
NORMS: dict[str, Callable[[nn.MultiheadAttention], Any]] = {
    "weight_norm of the packed projection": lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
    "spectral_norm of the packed projection": lambda m: parametrizations.spectral_norm(m, "in_proj_weight"),
    "weight_norm of the output projection": lambda m: parametrizations.weight_norm(m.out_proj),
    "spectral_norm of the output projection": lambda m: parametrizations.spectral_norm(m.out_proj),
}


@pytest.mark.parametrize("normalise", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("order", ["normalised, then converted", "converted, then normalised"])
@pytest.mark.parametrize("make", [lambda: SelfAttention(8, 2), lambda: MemoryAttention(8, 2)], ids=["self", "memory"])
def test_normalised_projections_are_routed(learn: Learn, normalise: Callable[[Any], Any], order: str, make: Make) -> None:
    plain = pair(make)[0].eval()
    torch.manual_seed(2)
    normalise(plain)
    model = pair(make)[0].eval()
    for step in [fahooks.convert, normalise] if order.startswith("converted") else [normalise, fahooks.convert]:
        torch.manual_seed(2)
        step(model)
    assert list(feedback_rules(model)) == PACKED
    inputs = cast(signals(8) if isinstance(model, SelfAttention) else signals(8, 8, lengths=(5, 3)))
    found, true = learn(model, *inputs), learn(plain, *inputs)
    torch.testing.assert_close(found.outputs, true.outputs, rtol=0, atol=0)

    baked = copy.deepcopy(plain)
    for module, name in ((baked, "in_proj_weight"), (baked.get_submodule("out_proj"), "weight")):
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name)
    rules = feedback_rules(model)
    expected = learn(baked, *inputs, around=lambda: oracle(baked, rules))
    for i in range(len(inputs)):
        torch.testing.assert_close(found.gradients[f"input {i}"], expected.gradients[f"input {i}"])
    assert found.distance(true) > 0.01


@pytest.mark.parametrize("normalise", NORMS.values(), ids=NORMS)
def test_converting_normalised_attention_does_not_move_the_normalisation(normalise: Callable[[Any], Any]) -> None:
    model = pair(lambda: SelfAttention(8, 2))[0].train()
    normalise(model)
    before = copy.deepcopy(model.state_dict())
    fahooks.convert(model)
    assert len(feedback_layers(model)) == 2
    torch.testing.assert_close(before, {key: model.state_dict()[key] for key in before}, rtol=0, atol=0)
