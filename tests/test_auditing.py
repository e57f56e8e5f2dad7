from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fahooks
from fahooks.plugins import InputError


class Applied(nn.Module):
    """A module made of a function of itself and its input, and of whatever it is given."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4)


def named(findings: Any) -> list[tuple[str, ...]]:
    return [use.parameters for use in findings.unrouted]


def test_a_model_that_needs_inputs_is_not_audited_without():
    with pytest.raises(
        InputError, match=r"^audit needs what the model is called with, .*: missing a required argument: 'input'$"
    ):
        fahooks.audit(nn.Linear(2, 2))


def test_every_layer_of_a_plain_model_is_unrouted_in_the_order_of_the_forward_pass():
    findings = fahooks.audit(network(), images())
    assert [(use.operation, *use.parameters) for use in findings.unrouted] == [("Convolution", "0.weight"), ("Addmm", "4.weight")]
    assert not findings.clean


def test_a_converted_model_is_clean_and_a_reverted_one_is_not():
    model = network()
    fahooks.convert(model, "fa")
    findings = fahooks.audit(model, images())
    assert findings.clean
    assert findings.routed == ("0", "4")
    assert (findings.never_called, findings.idle, findings.unrouted) == ((), (), ())
    with fahooks.backprop(model):
        assert len(fahooks.audit(model, images()).unrouted) == 2
    fahooks.revert(model)
    assert len(fahooks.audit(model, images()).unrouted) == 2


def test_a_weight_used_functionally_is_named_with_the_line_that_used_it():
    model = Applied(lambda self, x: F.linear(x, self.child.weight), child=nn.Linear(3, 4))
    fahooks.convert(model, "fa")
    findings = fahooks.audit(model, torch.randn(2, 3))
    assert findings.never_called == ("child",)
    assert named(findings) == [("child.weight",)]
    assert "test_auditing.py:" in findings.unrouted[0].source
    assert findings.unrouted[0].source.endswith("child=nn.Linear(3, 4))")


def test_a_layer_called_once_by_itself_and_once_functionally_is_routed_and_named():
    model = Applied(lambda self, x: self.child(x) + x @ self.child.weight.T, child=nn.Linear(3, 3))
    fahooks.convert(model, "fa")
    findings = fahooks.audit(model, torch.randn(2, 3))
    assert findings.routed == ("child",)
    assert findings.never_called == ()
    assert named(findings) == [("child.weight",)]


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda self, x: x @ self.w, (3, 4)),
        (lambda self, x: self.w @ x.mT, (4, 3)),
        (lambda self, x: x[0] @ self.w, (3,)),
        (lambda self, x: x[0, 0] @ self.w, (3,)),
        (lambda self, x: self.w @ x[0, 0], (4, 3)),
        (lambda self, x: F.linear(x, self.w[:2]), (4, 3)),
        (lambda self, x: F.linear(x, torch.cat([self.w, self.w.tanh()])), (4, 3)),
        (lambda self, x: torch.einsum("bij,jk->bik", x, self.w), (3, 4)),
        (lambda self, x: torch.einsum("bij,bjk->bik", x, self.w), (2, 3, 4)),
        (lambda self, x: torch.tensordot(x, self.w, dims=1), (3, 4)),
        (lambda self, x: torch.baddbmm(x, x, self.w), (2, 3, 3)),
        (lambda self, x: torch.addbmm(x[0], x, self.w), (2, 3, 3)),
        (lambda self, x: torch.addmv(x[0, 0], x[0], self.w), (3,)),
        (lambda self, x: torch.outer(x[0, 0], self.w).addr(x[0, 0], self.w), (3,)),
        (lambda self, x: F.bilinear(x, x, self.w), (4, 3, 3)),
        (lambda self, x: F.conv1d(x, self.w), (4, 3, 2)),
        (lambda self, x: F.conv_transpose1d(x, self.w), (3, 4, 2)),
        (lambda self, x: F.conv2d(x[None], self.w), (4, 2, 1, 1)),
        (lambda self, x: F.conv3d(x[None, None], self.w), (4, 1, 1, 1, 1)),
    ],
)
def test_every_linear_operation_with_a_parameter_is_found(function: Callable[..., Tensor], shape: tuple[int, ...]):
    findings = fahooks.audit(Applied(function, w=torch.randn(shape)), torch.randn(2, 3, 3))
    assert named(findings) == [("w",)]


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_are_found(layer: type[nn.Module]):
    model = Applied(lambda self, x: self.layer(x)[0], layer=layer(3, 4))
    found = {name for names in named(fahooks.audit(model, torch.randn(2, 5, 3))) for name in names}
    assert found >= {name for name, _ in model.named_parameters() if "weight" in name}


def test_norms_scales_and_products_of_signals_are_no_linear_maps_with_a_weight():
    def attention(self: Any, x: Tensor) -> Tensor:
        x = self.norm(x) * self.scale + self.position
        return (self.q(x) @ self.k(x).mT * self.temperature).softmax(-1) @ x

    parts = {"norm": nn.LayerNorm(3), "q": nn.Linear(3, 3), "k": nn.Linear(3, 3)}
    scales = {"scale": torch.ones(3), "position": torch.zeros(2, 5, 3), "temperature": torch.ones(1)}
    model = Applied(attention, **parts, **scales)
    assert named(fahooks.audit(model, torch.randn(2, 5, 3))) == [("q.weight",), ("k.weight",)]
    fahooks.convert(model, "usf_sn")
    assert fahooks.audit(model, torch.randn(2, 5, 3)).clean


def test_a_learned_query_is_a_signal_once_projected_and_a_weight_where_it_is_not():
    projected = Applied(
        lambda self, x: self.q(self.latent) @ self.k(x).mT, latent=torch.randn(1, 3), q=nn.Linear(3, 3), k=nn.Linear(3, 3)
    )
    fahooks.convert(projected, "fa")
    assert fahooks.audit(projected, torch.randn(2, 5, 3)).clean
    direct = Applied(lambda self, x: self.latent @ self.k(x).mT, latent=torch.randn(1, 3), k=nn.Linear(3, 3))
    fahooks.convert(direct, "fa")
    assert named(fahooks.audit(direct, torch.randn(2, 5, 3))) == [("latent",)]


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 1))
        self.right = nn.Parameter(torch.randn(1, 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def low_rank(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", LowRank())


@pytest.mark.parametrize(
    "change", [low_rank, parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_products_that_make_a_weight_are_not_on_the_path_of_the_error(change: Callable[[nn.Linear], nn.Module]):
    layer = change(nn.Linear(3, 4))
    parameters = {name for name, _ in layer.named_parameters() if name != "bias"}
    findings = fahooks.audit(layer, torch.randn(2, 3))
    assert [set(names) for names in named(findings)] == [parameters]
    fahooks.convert(layer, "fa")
    assert fahooks.audit(layer, torch.randn(2, 3)).clean


def test_a_layer_that_only_sees_a_constant_has_nothing_to_route():
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(x) + self.second(self.first(torch.ones(1, 3)))

    model = Applied(forward, first=nn.Linear(3, 3), second=nn.Linear(3, 3), out=nn.Linear(3, 3))
    fahooks.convert(model, "fa")
    findings = fahooks.audit(model, torch.randn(2, 3))
    assert findings.idle == ("first",)
    assert findings.routed == ("second", "out")
    assert findings.clean


def test_a_layer_of_another_mode_is_never_called():
    model = Applied(lambda self, x: self.aux(x) if self.training else self.main(x), aux=nn.Linear(3, 3), main=nn.Linear(3, 3))
    fahooks.convert(model, "fa")
    assert fahooks.audit(model.train(), torch.randn(2, 3)).never_called == ("main",)
    assert fahooks.audit(model.eval(), torch.randn(2, 3)).never_called == ("aux",)


def test_ignored_layers_are_not_listed_and_others_are():
    model = network()
    report = fahooks.convert(model, "fa", exclude="4")
    assert report.left_out == ["4"]
    assert named(fahooks.audit(model, images())) == [("4.weight",)]
    assert fahooks.audit(model, images(), ignore=report.left_out).clean
    assert fahooks.audit(model, images(), ignore="[0-9]").clean
    assert named(fahooks.audit(model, images(), ignore="0")) == [("4.weight",)]


@pytest.mark.parametrize("options", [{"rule": {"0": "fa"}}, {"rule": {"4": "bp", "0": "fa"}}, {"include": "0"}])
def test_layers_left_to_backpropagation_as_asked_are_left_out_and_unconvertible_ones_are_not(options: dict[str, Any]):
    model = network()
    model.add_module("gru", nn.GRU(2, 2))
    report = fahooks.convert(model, **options)
    assert report.left_out == ["4"]
    assert "gru" in report.skipped


def test_attention_is_ignored_by_its_own_name_or_that_of_its_weights():
    attention = nn.MultiheadAttention(4, 2)
    model = Applied(lambda self, x: self.attention(x, x, x, need_weights=False)[0], attention=attention)
    x = torch.randn(3, 2, 4)
    assert named(fahooks.audit(model, x)) == [("attention.in_proj_weight",), ("attention.out_proj.weight",)]
    assert fahooks.audit(model, x, ignore="attention").clean
    assert named(fahooks.audit(model, x, ignore="attention.out_proj")) == [("attention.in_proj_weight",)]
    report = fahooks.convert(model, "fa", exclude="attention.out_proj")
    assert named(fahooks.audit(model, x)) == [("attention.out_proj.weight",)]
    assert fahooks.audit(model, x, ignore=report.left_out).clean


def test_parts_of_a_packed_weight_are_routed_through_its_rule():
    attention = nn.MultiheadAttention(4, 2)
    fahooks.convert(attention, "fa")
    q, k, v = torch.randn(3, 5, 2, 4).unbind(0)
    findings = fahooks.audit(attention, q, k, v)
    assert findings.clean
    assert findings.routed == ("in_proj_weight", "out_proj")


def test_tied_weights_are_named_by_all_their_names_and_ignored_by_any():
    embedding, decoder = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    decoder.weight = embedding.weight
    model = Applied(lambda self, x: self.decoder(self.embedding(x)), embedding=embedding, decoder=decoder)
    tokens = torch.tensor([[1, 2]])
    assert named(fahooks.audit(model, tokens)) == [("decoder.weight", "embedding.weight")]
    assert fahooks.audit(model, tokens, ignore="decoder").clean
    fahooks.convert(model, "fa")
    assert fahooks.audit(model, tokens).clean


def test_shared_layers_and_layers_with_one_parameter_are_each_seen():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second, first)
    fahooks.convert(model, "fa")
    findings = fahooks.audit(model, torch.randn(2, 3))
    assert findings.clean
    assert findings.routed == ("0", "1")


def test_an_opaque_function_with_a_matrix_is_named_and_one_with_a_vector_is_not():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
            return (x @ parameter if parameter.dim() > 1 else x * parameter).clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            raise NotImplementedError

    model = Applied(lambda self, x: Opaque.apply(x, self.w), w=torch.randn(3, 3))
    assert named(fahooks.audit(model, torch.randn(2, 3))) == [("w",)]
    assert fahooks.audit(Applied(model.function, w=torch.randn(3)), torch.randn(2, 3)).clean


@dataclass
class Output:
    logits: Tensor
    extra: Any = None


@pytest.mark.parametrize(
    "wrap", [lambda y: {"a": [y]}, lambda y: (1, "text", (y,)), Output, lambda y: [Output(torch.ones(1), {"deep": y})]]
)
def test_outputs_are_found_in_containers(wrap: Callable[[Tensor], Any]):
    model = Applied(lambda self, x: wrap(self.layer(x)), layer=nn.Linear(3, 3))
    assert named(fahooks.audit(model, torch.randn(2, 3))) == [("layer.weight",)]
    fahooks.convert(model, "fa")
    assert fahooks.audit(model, torch.randn(2, 3)).routed == ("layer",)


def test_inputs_may_be_nested_named_integer_and_overwritten():
    def forward(self: Any, batch: dict[str, Any], *, offset: Tensor) -> Tensor:
        batch["x"][0].sub_(1)
        return self.layer(batch["x"][0] + self.embedding(batch["index"]) + offset)

    model = Applied(forward, layer=nn.Linear(3, 3), embedding=nn.Embedding(4, 3))
    fahooks.convert(model, "fa")
    x = torch.randn(2, 3)
    before = x.clone()
    assert fahooks.audit(model, {"x": [x], "index": torch.tensor([0, 1])}, offset=torch.zeros(3)).clean
    assert torch.equal(x, before) and not x.requires_grad


def test_the_first_layer_is_audited_though_images_need_no_gradient():
    model = Applied(lambda self, x: F.linear(x, self.w), w=torch.randn(3, 3))
    assert named(fahooks.audit(model, torch.randn(2, 3))) == [("w",)]


def test_the_model_is_left_as_it_was_found():
    model = network().train()
    model.append(nn.Dropout(0.5))
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(2)
    fahooks.convert(model, "fa")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    buffers = [id(buffer) for buffer in model.buffers()]
    x, random = images(), torch.get_rng_state()
    assert fahooks.audit(model, x).clean, "the frozen layer is audited too"
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]
    assert buffers == [id(buffer) for buffer in model.buffers()]
    assert torch.equal(random, torch.get_rng_state())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["4.bias"]
    assert torch.equal(model[4].bias.grad, torch.ones(2))
    assert not torch.is_anomaly_enabled()


def test_the_model_is_left_as_it_was_found_when_it_raises():
    def forward(self: Any, x: Tensor) -> Tensor:
        raise RuntimeError(f"broken model {self.norm(x) * torch.rand(1)}")

    norm = nn.BatchNorm1d(3)
    model = Applied(forward, norm=norm).requires_grad_(False)
    x, random = torch.randn(2, 3), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken model"):
        fahooks.audit(model, x)
    assert torch.equal(random, torch.get_rng_state())
    assert norm.num_batches_tracked == 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    "forward", [torch.no_grad()(lambda self, x: self.layer(x)), lambda self, x: self.layer(x).detach(), lambda self, x: 1]
)
def test_a_forward_pass_without_gradients_is_an_error_of_one_line(forward: Callable[..., Any]):
    with pytest.raises(InputError, match="^nothing to audit: no output of the model carries a gradient[^\n]*$"):
        fahooks.audit(Applied(forward, layer=nn.Linear(3, 3)), torch.randn(2, 3))


def test_an_audit_called_under_no_grad_records_gradients_all_the_same():
    model = network()
    fahooks.convert(model, "fa")
    with torch.no_grad():
        assert fahooks.audit(model, images()).clean
        assert not torch.is_grad_enabled()


def test_checkpointed_layers_are_audited():
    model = Applied(lambda self, x: checkpoint(self.layer, x, use_reentrant=False), layer=nn.Linear(3, 3))
    fahooks.convert(model, "fa")
    assert fahooks.audit(model, torch.randn(2, 3)).routed == ("layer",)


def test_deep_graphs_are_audited():
    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(2000):
            x = x + 1
        return self.layer(x)

    assert named(fahooks.audit(Applied(forward, layer=nn.Linear(3, 3)), torch.randn(2, 3))) == [("layer.weight",)]


def test_a_model_that_is_one_layer_has_the_empty_name():
    model = nn.Linear(3, 3)
    assert named(fahooks.audit(model, torch.randn(2, 3))) == [("weight",)]
    fahooks.convert(model, "fa")
    assert fahooks.audit(model, torch.randn(2, 3)).routed == ("",)


def test_findings_print_as_a_table():
    model = network()
    model.append(Applied(lambda self, x: x @ self.w, w=torch.randn(2, 2)))
    model[0].add_module("unused", nn.Linear(1, 1))
    fahooks.convert(model, "fa")
    never_called, unrouted, total = str(fahooks.audit(model, images())).splitlines()
    assert never_called == "never called  0.unused"
    assert unrouted.startswith("unrouted Mm   5.w       ")
    assert unrouted.endswith("w=torch.randn(2, 2)))")
    assert total == "not clean: 2 weights routed, 1 never called, 1 unrouted operations"
    fahooks.revert(model)
    assert str(fahooks.audit(model, images(), ignore="*")) == "clean: 0 weights routed, 0 never called, 0 unrouted operations"


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), nn.Linear(8, 3))


def siamese(interleaved: bool) -> nn.Module:
    """One network for both halves of the example, which is called once."""
    join = (lambda x, y: torch.stack([x, y], 1).flatten(0, 1)) if interleaved else (lambda x, y: torch.cat([x, y]))
    part = (lambda h: h.unflatten(0, (-1, 2)).unbind(1)) if interleaved else (lambda h: h.chunk(2))

    def forward(own: Any, x: Tensor, y: Tensor) -> Tensor:
        return own.head(torch.cat(part(own.body(join(x, y)).relu()), 1))

    torch.manual_seed(0)
    return Applied(forward, body=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), head=nn.Linear(6, 2))


def table(learned: bool) -> nn.Module:
    """Adds to its input, of a batch of 3, what a layer makes of it or of a table with 6 rows."""

    def forward(own: Any, x: Tensor) -> Tensor:
        return own.head(x + (own.layer(own.rows).view(2, 3, 5).sum(0) if learned else own.layer(x)))

    torch.manual_seed(0)
    return Applied(forward, rows=torch.randn(6, 5), layer=nn.Linear(5, 5), head=nn.Linear(5, 2))


def recurrent(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    return Applied(lambda own, x: own.head(own.rnn(x)[0]), rnn=nn.LSTM(6, 4, batch_first=batch_first), head=nn.Linear(4, 3))


MIXED: dict[str, tuple[nn.Module, nn.Module, list[tuple[int, ...]], list[str]]] = {
    "sequence first": (encoder(True), encoder(False), [(5, 5, 8)], ["0.self_attn.in_proj_weight", "0.linear1", "0.linear2", "1"]),
    "recurrent": (recurrent(True), recurrent(False), [(5, 7, 6)], ["head"]),
    "siamese": (siamese(True), siamese(False), [(4, 4), (4, 4)], ["body.0", "body.2"]),
    "table": (table(False), table(True), [(3, 5)], ["layer"]),
}
"""A model whose samples lie as direct rules take them, one whose do not, what both are called with, and layers of that one."""


@pytest.mark.parametrize("rule", ["dfa", "dense_fa"])
@pytest.mark.parametrize("name", MIXED)
def test_layers_at_which_samples_are_mixed_are_named(name: str, rule: str):
    good, bad, shapes, expected = MIXED[name]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    for model in (good, bad):
        fahooks.convert(model, rule)
    assert fahooks.audit(good, *inputs).mixed == ()
    findings = fahooks.audit(bad, *inputs)
    assert set(findings.mixed) >= set(expected) and not findings.clean
    assert "mixed samples  " in str(findings) and f", {len(findings.mixed)} with mixed samples" in str(findings)
    assert fahooks.audit(bad, *(torch.ones_like(x) for x in inputs)).mixed == (), "control: samples that are alike tell nothing"
    fahooks.convert(bad, "fa")
    assert fahooks.audit(bad, *inputs).mixed == (), "control: feedback alignment does not ask what a sample is"


def test_what_every_sample_has_in_common_mixes_none():
    token = torch.randn(5)
    model = Applied(lambda own, x: own.layer(own.token.expand_as(x)) * x, token=token, layer=nn.Linear(5, 5))
    fahooks.convert(model, "dfa")
    assert fahooks.audit(model, torch.randn(3, 5)).clean


def test_batch_statistics_do_not_mix_samples():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    fahooks.convert(model, "dfa")
    assert fahooks.audit(model, torch.randn(8, 3, 4, 4)).clean
    assert model.training
