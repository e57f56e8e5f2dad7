from __future__ import annotations

import copy
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, cast

import pytest
import torch
from timm.layers import bottleneck_attn, halo_attn
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.lambda_layer import LambdaLayer
from timm.models import vision_transformer_sam as sam
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.mvitv2 import MultiScaleAttention
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.swiftformer import EfficientAdditiveAttention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from transformers.pytorch_utils import Conv1D

import fahooks
from fahooks import plugins
from fahooks.plugins import InputError
from fahooks.reference import oracle
from fahooks.surgery import feedback_rules

Maker = Callable[[], nn.Module]


class Patches(nn.Module):
    """Patch embedding of patches that come with their size, projected by the interpolator."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = NaFlexEmbeds(patch_size=2, embed_dim=8, proj_type="linear", enable_patch_interpolator=True)

    def forward(self, patches: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        coordinates = torch.stack([rows, columns], -1).flatten(0, 1)[None].expand(len(patches), -1, -1)
        found = self.embeds(patches, patch_coord=coordinates)
        return found[0] if isinstance(found, tuple) else found


class Queries(nn.Module):
    """Queries [N, 2, 4, 8], of which the relative positions are asked."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.to_queries = nn.Linear(8, 8)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(self.to_queries(x))


class Tokens(nn.Module):
    """Attention that wants to know the grid of its tokens; the gradient-free grid that it returns is left out."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, [2, 2])[0]


class Mixed(nn.Module):
    """A convolution whose kernels are mixed anew for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = nn.Linear(4, 3)
        self.convolution = CondConv2d(4, 6, 3, padding=1, groups=2, bias=True, num_experts=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x, self.routing(x.mean((2, 3))).sigmoid())


def embeddings(positions: nn.Module) -> nn.Module:
    """With embeddings of size 1: they start as zero, or as nothing."""
    for parameter in positions.parameters():
        nn.init.normal_(parameter)
    return positions


class Twice(nn.Module):
    """A bilinear map of two layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.bilinear = nn.Bilinear(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.left(x), x)


ADAPTED: list[tuple[str, Maker, tuple[int, ...], list[str]]] = [
    ("torch.nn.modules.linear.Bilinear", Twice, (2, 6, 4), ["bilinear.weight"]),
    ("timm.models.beit.Attention", lambda: BeitAttention(8, num_heads=2, qkv_bias=True), (2, 5, 8), ["qkv.weight"]),
    ("timm.models.eva.EvaAttention", lambda: EvaAttention(8, num_heads=2, scale_norm=False), (2, 5, 8), ["qkv.weight"]),
    ("timm.models.naflexvit.NaFlexEmbeds", Patches, (2, 4, 2, 2, 3), ["proj.weight"]),
    (
        "timm.models.swin_transformer_v2.WindowAttention",
        lambda: WindowAttention(8, (2, 2), num_heads=2),
        (2, 4, 8),
        ["qkv.weight"],
    ),
    (
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        lambda: ShiftedWindowAttention(8, [2, 2], [1, 1], num_heads=2),
        (2, 4, 4, 8),
        ["qkv.weight", "proj.weight"],
    ),
    (
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        lambda: ShiftedWindowAttentionV2(8, [2, 2], [1, 1], num_heads=2),
        (2, 4, 4, 8),
        ["qkv.weight", "proj.weight"],
    ),
    (
        "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
        lambda: ShiftedWindowAttention3d(8, [2, 2, 2], [1, 1, 1], num_heads=2),
        (1, 2, 4, 4, 8),
        ["qkv.weight", "proj.weight"],
    ),
    (
        "timm.layers.bottleneck_attn.PosEmbedRel",
        lambda: Queries(embeddings(bottleneck_attn.PosEmbedRel((2, 3), dim_head=8, scale=1.0))),
        (4, 6, 8),
        ["positions.height_rel", "positions.width_rel"],
    ),
    (
        "timm.layers.halo_attn.PosEmbedRel",
        lambda: Queries(embeddings(halo_attn.PosEmbedRel(block_size=2, win_size=4, dim_head=8, scale=1.0))),
        (3, 2, 4, 8),
        ["positions.height_rel", "positions.width_rel"],
    ),
    (
        "timm.layers.lambda_layer.LambdaLayer",
        lambda: cast(Any, LambdaLayer)(8, 8, feat_size=(2, 3), r=None, num_heads=2),
        (2, 8, 2, 3),
        ["pos_emb"],
    ),
    (
        "timm.models.mvitv2.MultiScaleAttention",
        lambda: Tokens(embeddings(MultiScaleAttention(8, 8, (2, 2), num_heads=2, has_cls_token=False))),
        (2, 4, 8),
        ["attention.rel_pos_h", "attention.rel_pos_w"],
    ),
    (
        "timm.models.vision_transformer_sam.Attention",
        lambda: embeddings(sam.Attention(8, num_heads=2, use_rel_pos=True, input_size=(2, 3))),
        (2, 2, 3, 8),
        ["rel_pos_h", "rel_pos_w"],
    ),
    (
        "timm.models.swiftformer.EfficientAdditiveAttention",
        lambda: EfficientAdditiveAttention(8, 4, num_heads=2),
        (2, 8, 2, 3),
        ["w_g"],
    ),
    ("timm.layers.cond_conv2d.CondConv2d", Mixed, (2, 4, 5, 5), ["convolution.weight", "convolution.bias"]),
    (
        "transformers.pytorch_utils.Conv1D",
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Conv1D(6, 8)),
        (2, 5, 8),
        ["2.weight"],
    ),
]
"""Dotted name, what makes a module, the shape of its input, the weights that it uses functionally."""

each_adapter = pytest.mark.parametrize(("name", "make", "shape", "weights"), ADAPTED)


def test_every_adapter_is_for_a_class_that_exists_and_is_tested():
    names = plugins.adapters.names()
    assert all(issubclass(resolve_name(name), nn.Module) for name in names)
    assert {name for name, *_ in ADAPTED} | {"torch.nn.modules.activation.MultiheadAttention"} == set(names)


@each_adapter
def test_functional_weights_are_routed_and_without_the_adapter_they_are_not(
    name: str, make: Maker, shape: tuple[int, ...], weights: list[str], monkeypatch: pytest.MonkeyPatch
):
    x = torch.randn(shape)
    with_adapter = make()
    fahooks.convert(with_adapter, "fa")
    findings = fahooks.audit(with_adapter, x)
    assert findings.clean, str(findings)

    monkeypatch.delitem(plugins.adapters._entries, name)
    without = make()
    fahooks.convert(without, "fa")
    named = {parameter for use in fahooks.audit(without, x).unrouted for parameter in use.parameters}
    assert {parameter.removeprefix("embeds.") for parameter in named} == set(weights)


@each_adapter
@pytest.mark.parametrize("rule", ["fa", "usf_sn"])
def test_gradients_equal_the_oracle(name: str, make: Maker, shape: tuple[int, ...], weights: list[str], rule: str):
    torch.manual_seed(0)
    plain = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule)
    with oracle(plain, feedback_rules(converted)):
        expected, expected_gradients = learn(plain, x)
    output, gradients = learn(converted, x)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    _, true_gradients = learn(plain, x)
    assert gradients.keys() == true_gradients.keys()
    assert not torch.allclose(gradients["input"], true_gradients["input"], rtol=0.01), "control: not what backpropagation sends"


@each_adapter
def test_a_child_that_is_left_out_leaves_the_module_as_it_is(name: str, make: Maker, shape: tuple[int, ...], weights: list[str]):
    model = Beside(make())
    before = {key: type(module) for key, module in model.named_modules()}
    report = fahooks.convert(model, "fa", exclude="adapted")
    assert report.converted == ["linear"]
    assert {key: type(module) for key, module in model.named_modules() if key.startswith("adapted")} == {
        key: cls for key, cls in before.items() if key.startswith("adapted")
    }
    assert fahooks.audit(model, torch.randn(shape), ignore=report.left_out).clean


class Beside(nn.Module):
    """A module, and a linear layer that reads the same input."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.adapted = adapted
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x).sum() + self.linear(x.flatten()[:3]).sum()


def test_attention_with_split_projections_calls_its_layers():
    attention = EvaAttention(8, num_heads=2, qkv_fused=False, scale_norm=False)
    report = fahooks.convert(attention, "fa")
    assert report.converted == ["q_proj", "k_proj", "v_proj", "proj"]
    assert fahooks.audit(attention, torch.randn(2, 5, 8)).clean


class Product(nn.Module):
    """A product with a matrix of its own, in several ways of writing it."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.multiply = multiply
        self.table = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.table)


def named(cls: type[nn.Module], weight: str) -> tuple[str, plugins.Entry]:
    """An adapter for a class, that names a weight."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    return name, plugins.Entry("adapter", name, lambda module: [weight], "", "", "")


WRITTEN: list[tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = [
    (lambda x, w: x @ w, (4, 5)),
    (lambda x, w: x @ w.t(), (5, 4)),
    (lambda x, w: x @ w.T, (5, 4)),
    (lambda x, w: x @ w.mT, (5, 4)),
    (lambda x, w: x.matmul(w.transpose(0, 1)), (5, 4)),
    (lambda x, w: torch.matmul(w, x), (5, 3)),
    (lambda x, w: torch.bmm(x, w.view(2, 4, 5)), (8, 5)),
    (lambda x, w: torch.addmm(x[1, :, :1] * 2, x[0], w, alpha=0.5), (4, 5)),
    (lambda x, w: torch.baddbmm(x[:, :, :1], x, w.reshape(2, 4, 5)), (2, 20)),
    (lambda x, w: torch.einsum("nic,koc->niko", x, w), (2, 5, 4)),
    (lambda x, w: x @ w[torch.tensor([0, 0, 2, 1])], (3, 5)),
    (lambda x, w: torch.nn.functional.linear(x, w.permute(1, 0)), (4, 5)),
]
"""Products of x [2, 3, 4] with a weight, and the weight's shape."""


@pytest.mark.parametrize(("multiply", "shape"), WRITTEN)
@pytest.mark.parametrize("rule", ["fa", "usf_sn", "sham"])
def test_a_named_weight_is_routed_however_its_product_is_written(
    multiply: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], rule: str, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    plain = Product(multiply, *shape).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    unnamed = copy.deepcopy(plain)
    assert [use.parameters for use in fahooks.audit(unnamed, x).unrouted] == [("table",)], "control: nothing routes it"
    monkeypatch.setitem(plugins.adapters._entries, *named(Product, "table"))
    converted = copy.deepcopy(plain)
    report = fahooks.convert(converted, rule)
    assert report.converted == ["table"]
    assert fahooks.audit(converted, x).clean
    _, true = learn(plain, x)
    with oracle(plain, feedback_rules(converted)):
        expected, expected_gradients = learn(plain, x)
    output, gradients = learn(converted, x)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert torch.equal(gradients["table"], true["table"])
    assert torch.equal(gradients["input"], true["input"]) == (rule == "sham")


def test_direct_rules_refuse_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(plugins.adapters._entries, *named(Product, "table"))
    model = Product(torch.matmul, 4, 5)
    fahooks.convert(model, "dfa")
    with pytest.raises(InputError, match="dfa: 'table' is used in a matmul, and direct rules serve linear maps and convolutions"):
        model(torch.randn(2, 3, 4, requires_grad=True))


def test_a_transposed_weight_has_the_fans_of_a_linear_map():
    for init in ("fan_out", "fan_in"):
        linear, transposed = nn.Linear(300, 40), Conv1D(40, 300)
        assert transposed.weight.shape == linear.weight.mT.shape
        deviations = []
        for model in (linear, transposed):
            fahooks.convert(model, "fa", init=init)
            (rule,) = feedback_rules(model).values()
            deviations.append(rule.get_buffer("matrix").std().item())
        assert deviations[0] == pytest.approx(deviations[1], rel=0.05), "wrong fans would make it 2.7 times as large or as small"


def test_dales_law_takes_the_inputs_of_a_transposed_weight_for_units():
    layer = Conv1D(6, 8)
    model = nn.Sequential(layer)
    fahooks.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), fahooks.Dale(match="*"))
    signs = layer.weight.sign()
    assert torch.equal(signs, signs[:, :1].expand(8, 6)) and len(signs.unique()) == 2


def learn(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    leaves = {"input": x, **dict(model.named_parameters())}
    return output, {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
