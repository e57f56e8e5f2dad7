from __future__ import annotations

import copy
from collections.abc import Callable
from pkgutil import resolve_name

import pytest
import torch
from timm.layers.cond_conv2d import CondConv2d
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

import fahooks
from fahooks import plugins
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


ADAPTED: list[tuple[str, Maker, tuple[int, ...], list[str]]] = [
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
    model = nn.Sequential(make(), nn.Linear(8, 8))
    before = {key: type(module) for key, module in model.named_modules()}
    report = fahooks.convert(model, "fa", exclude="0")
    assert {key: type(module) for key, module in model.named_modules() if key.startswith("0")} == {
        key: cls for key, cls in before.items() if key.startswith("0")
    }
    assert fahooks.audit(model, torch.randn(shape), ignore=report.left_out).clean


def test_attention_with_split_projections_calls_its_layers():
    attention = EvaAttention(8, num_heads=2, qkv_fused=False, scale_norm=False)
    report = fahooks.convert(attention, "fa")
    assert report.converted == ["q_proj", "k_proj", "v_proj", "proj"]
    assert fahooks.audit(attention, torch.randn(2, 5, 8)).clean


def test_a_weight_that_no_adapter_can_name_is_named_by_the_audit():
    experts = CondConv2d(3, 4, kernel_size=3, num_experts=2)
    findings = fahooks.audit(experts, torch.randn(2, 3, 5, 5), torch.rand(2, 2))
    assert [use.parameters for use in findings.unrouted] == [("weight",)]


def learn(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    leaves = {"input": x, **dict(model.named_parameters())}
    return output, {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
