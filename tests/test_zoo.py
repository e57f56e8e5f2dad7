"""Models of many families of timm and torchvision, small or shrunken: conversion is exact on each of them."""

from __future__ import annotations

import copy
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import fahooks
from fahooks.reference import oracle
from fahooks.surgery import feedback_rules

Gradients = dict[str, Tensor]

ZOO: list[tuple[str, int, dict[str, Any]]] = [
    ("timm.models:test_byobnet", 32, {}),
    ("timm.models:test_coatnet", 64, {"img_size": 64}),
    ("timm.models:test_convnext", 32, {}),
    ("timm.models:test_efficientnet_evos", 32, {}),
    ("timm.models:test_mambaout", 32, {}),
    ("timm.models:test_maxvit", 64, {"img_size": 64}),
    ("timm.models:test_nfnet", 64, {}),
    ("timm.models:test_vit4", 32, {"img_size": 32}),
    ("timm.models:test_vit_relpos", 32, {"img_size": 32}),
    ("timm.models:beit_base_patch16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ("timm.models:beitv2_base_patch16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ("timm.models:cait_xxs24_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 48}),
    ("timm.models:coat_tiny", 32, {"img_size": 32, "embed_dims": [16] * 4, "serial_depths": [1] * 4, "parallel_depth": 1}),
    ("timm.models:convit_tiny", 32, {"img_size": 32, "depth": 2, "local_up_to_layer": 1}),
    ("timm.models:convnextv2_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ("timm.models:crossvit_tiny_240", 120, {"img_size": 120, "depth": ((1, 1, 0), (1, 1, 0))}),
    ("timm.models:davit_tiny", 32, {"depths": (1, 1), "embed_dims": (16, 24), "num_heads": (2, 4)}),
    ("timm.models:deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("timm.models:densenet121", 32, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    ("timm.models:dla46x_c", 32, {}),
    ("timm.models:dpn48b", 32, {"num_classes": 10}),
    ("timm.models:edgenext_xx_small", 32, {}),
    ("timm.models:efficientformer_l1", 224, {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_vit": 1}),
    ("timm.models:efficientvit_m0", 224, {}),
    ("timm.models:eva02_tiny_patch14_224", 28, {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ("timm.models:eva_large_patch14_196", 28, {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ("timm.models:fastvit_t8", 64, {"layers": (1, 1, 1, 1)}),
    ("timm.models:ghostnet_050", 32, {}),
    ("timm.models:gmlp_ti16_224", 32, {"img_size": 32, "num_classes": 10}),
    ("timm.models:hardcorenas_a", 32, {}),
    ("timm.models:hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16}),
    ("timm.models:hrnet_w18_small", 32, {}),
    ("timm.models:lambda_resnet26t", 64, {}),
    ("timm.models:levit_128s", 64, {"img_size": 64}),
    ("timm.models:mixnet_s", 32, {}),
    ("timm.models:mobilenetv3_small_050", 32, {}),
    ("timm.models:mobilevit_xxs", 64, {}),
    ("timm.models:mobilevitv2_050", 64, {}),
    ("timm.models:nf_regnet_b0", 32, {}),
    ("timm.models:pit_ti_224", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    ("timm.models:poolformer_s12", 32, {}),
    ("timm.models:pvt_v2_b0", 32, {"depths": (1, 1, 1, 1)}),
    ("timm.models:regnety_002", 32, {}),
    ("timm.models:repvgg_a0", 32, {}),
    ("timm.models:res2net50_14w_8s", 32, {"layers": (1, 1, 1, 1)}),
    ("timm.models:resnest14d", 32, {"num_classes": 10}),
    ("timm.models:resnet18", 32, {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    ("timm.models:resnetv2_50", 32, {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)}),
    ("timm.models:rexnet_100", 32, {}),
    ("timm.models:skresnet18", 32, {"channels": (16, 24, 32, 40)}),
    ("timm.models:swin_tiny_patch4_window7_224", 56, {"img_size": 56, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    ("timm.models:swinv2_cr_tiny_224", 56, {"img_size": 56, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    (
        "timm.models:swinv2_tiny_window8_256",
        32,
        {"img_size": 32, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4), "window_size": 4},
    ),
    ("timm.models:tf_efficientnet_b0", 32, {}),
    ("timm.models:tnt_s_legacy_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("timm.models:twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64)}),
    ("timm.models:visformer_tiny", 32, {"img_size": 32, "embed_dim": 48}),
    ("timm.models:xcit_nano_12_p16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 48}),
    ("timm.models.mlp_mixer:MlpMixer", 32, {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24}),
    ("timm.models.nest:Nest", 64, {"img_size": 64, "embed_dims": (16, 24, 32), "num_heads": (2, 2, 2), "depths": (1, 1, 2)}),
    (
        "timm.models.volo:VOLO",
        64,
        {
            "img_size": 64,
            "layers": (1, 1),
            "embed_dims": (24, 48),
            "num_heads": (2, 4),
            "downsamples": (True, False),
            "outlook_attention": (True, False),
            "post_layers": ("ca",),
        },
    ),
    ("timm.models.vgg:VGG", 32, {"cfg": [8, "M", 16, "M", 32, "M"], "mlp_ratio": 0.01}),
    ("timm.models:cspresnet50", 32, {}),
    ("torchvision.models:efficientnet_b0", 32, {"num_classes": 10}),
    ("torchvision.models:googlenet", 64, {"num_classes": 10, "init_weights": False}),
    ("torchvision.models:mnasnet0_5", 32, {}),
    ("torchvision.models:mobilenet_v2", 32, {"width_mult": 0.25}),
    ("torchvision.models:shufflenet_v2_x0_5", 32, {}),
    ("torchvision.models:squeezenet1_1", 32, {"num_classes": 10}),
    (
        "torchvision.models:ConvNeXt",
        32,
        {"block_setting": [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], "stochastic_depth_prob": 0.1},
    ),
    (
        "torchvision.models:MaxVit",
        64,
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 4,
            "block_channels": [16, 24],
            "block_layers": [1, 1],
            "head_dim": 8,
            "stochastic_depth_prob": 0.1,
        },
    ),
    (
        "torchvision.models:SwinTransformer",
        32,
        {"patch_size": [4, 4], "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": [4, 4]},
    ),
    (
        "torchvision.models:SwinTransformer",
        32,
        {
            "patch_size": [4, 4],
            "embed_dim": 24,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": [4, 4],
            "block": SwinTransformerBlockV2,
            "downsample_layer": PatchMergingV2,
        },
    ),
    (
        "torchvision.models:VisionTransformer",
        32,
        {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96},
    ),
]
"""What makes a model, the side of its images, the options that shrink it."""


@pytest.mark.parametrize(("spec", "side", "options"), ZOO, ids=[spec for spec, _, _ in ZOO])
def test_conversion_is_exact(spec: str, side: int, options: dict[str, Any]) -> None:
    plain = make(spec, options)
    images = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_eval = outputs(copy.deepcopy(plain).eval(), images)
    expected_train, true = learn(copy.deepcopy(plain), images)
    for rule in ("fa", "usf_sn"):
        converted = copy.deepcopy(plain)
        fahooks.convert(converted, rule)
        assert_same_bits(outputs(copy.deepcopy(converted).eval(), images), expected_eval)
        findings = fahooks.audit(converted.train(), images)
        assert findings.clean, str(findings)
        surrogate = copy.deepcopy(plain)
        with oracle(surrogate, feedback_rules(converted)):
            _, expected = learn(surrogate, images)
        found_train, found = learn(converted, images)
        assert_same_bits(found_train, expected_train)
        assert found.keys() == true.keys(), "a parameter has a gradient with backpropagation only, or without it only"
        assert_same_gradients(found, expected)
        assert distance(found, true) > 1e-2, "control: the rule sends what backpropagation sends"


@pytest.mark.parametrize(
    ("spec", "side", "options"),
    [
        ("timm.models:test_byobnet", 32, {}),
        ("timm.models:test_vit4", 32, {"img_size": 32}),
        ("timm.models:resnet18", 32, {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
        (
            "timm.models:swin_tiny_patch4_window7_224",
            56,
            {"img_size": 56, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)},
        ),
        ("torchvision.models:mobilenet_v2", 32, {"width_mult": 0.25}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_direct_feedback_is_exact(spec: str, side: int, options: dict[str, Any]) -> None:
    plain = make(spec, options)
    images = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_outputs, true = learn(copy.deepcopy(plain), images)
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, "dfa", feedback="channel")
    found_outputs, found = learn(converted, images)
    assert_same_bits(found_outputs, expected_outputs)
    assert found.keys() == true.keys()
    findings = fahooks.audit(copy.deepcopy(converted), images)
    assert findings.clean, str(findings)
    rules: Any = feedback_rules(converted)
    matrices = {name: rule.matrix.values.double() for name, rule in rules.items()}
    assert_same_gradients(found, learn_directly(plain, images, matrices))
    assert distance(found, true) > 1e-2, "control: the rule sends what backpropagation sends"


def learn_directly(model: nn.Module, images: Tensor, matrices: dict[str, Tensor]) -> Gradients:
    """The gradients of `learn`, in plain autograd: layers read copies of their inputs, which get B e, B [channels, outputs]."""
    inputs: list[tuple[Tensor, nn.Module, Tensor]] = []
    for name, matrix in matrices.items():

        def cut(module: nn.Module, args: tuple[Tensor], matrix: Tensor = matrix) -> Tensor:
            inputs.append((args[0], module, matrix))
            return args[0].detach()

        model.get_submodule(name).register_forward_pre_hook(cut)
    torch.manual_seed(2)
    images = images.clone().requires_grad_()
    (output,) = outputs(model.train(), images)
    error = torch.linspace(-1, 1, output.numel()).view_as(output).double()
    total = (output * error).sum()
    for x, module, matrix in inputs:
        signal = (error @ matrix.t()).repeat_interleave(len(x) // len(error), 0)
        place = -1 if isinstance(module, nn.Linear) else 1
        total = total + (x.movedim(place, 1).flatten(2).sum(2) if x.dim() > 2 else x).mul(signal).sum()
    total.backward()
    leaves = {"images": images, **dict(model.named_parameters())}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def make(spec: str, options: dict[str, Any]) -> nn.Module:
    """The model in float64; what starts as a constant (zero residual branches, layer scale) gets noise, to carry error."""
    torch.manual_seed(0)
    model = resolve_name(spec)(**options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.std() == 0:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(model(images)) if isinstance(leaf, Tensor)]


def learn(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Gradients]:
    """Outputs in training mode, and the gradients of all parameters and of the images under a loss that weighs each output."""
    torch.manual_seed(2)
    images = images.clone().requires_grad_()
    found = outputs(model.train(), images)
    torch.stack([(output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in found]).sum().backward()
    leaves = {"images": images, **dict(model.named_parameters())}
    return found, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(a.isfinite().all() for a in found)


def assert_same_gradients(found: Gradients, expected: Gradients) -> None:
    """Tolerances are of the size of float64's rounding, relative to the largest gradient where one is nothing but rounding."""
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert 0 < scale < 1e100
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-6, atol=1e-10 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def distance(found: Gradients, expected: Gradients) -> float:
    """Of the gradients of the images, relative to their size."""
    return ((found["images"] - expected["images"]).norm() / expected["images"].norm()).item()
