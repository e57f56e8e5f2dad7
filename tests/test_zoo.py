"""A model of every family of timm and torchvision, small: conversion is exact on each of them.

`python -m tests.zoo --all` checks every model of every family.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import fahooks
from fahooks.surgery import feedback_rules
from tests.zoo import __main__ as zoo
from tests.zoo.exactness import Gradients, distance, learn, require_same_bits, require_same_gradients
from tests.zoo.names import check_by_name, family, small

ZOO = """
timm/beit_base_patch16_224
timm/cait_xxs24_384
timm/coat_lite_tiny
timm/convit_tiny
timm/convmixer_1024_20_ks9_p14
timm/cpubone_t0
timm/crossvit_tiny_240
timm/cs3darknet_s
timm/csatv2
timm/cspnext_tiny
timm/davit_tiny
timm/deepseek_vit_412m
timm/deit_tiny_distilled_patch16_224
timm/densenet121
timm/dla46x_c
timm/dpn48b
timm/edgenext_x_small
timm/efficientformer_l3
timm/efficientformerv2_s0
timm/efficientvim_m1
timm/efficientvit_b0
timm/efficientvit_m1
timm/ese_vovnet19b_slim
timm/eva02_tiny_patch14_224
timm/fasternet_t0
timm/fastvit_t8
timm/focalnet_tiny_srf
timm/gcvit_xxtiny
timm/gemma4_vit_167m
timm/ghostnet_050
timm/gmlp_ti16_224
timm/hardcorenas_a
timm/hgnetv2_b0
timm/hiera_small_abswin_256
timm/hieradet_small
timm/hrnet_w18_small
timm/iformer_t
timm/inception_next_atto
timm/inception_resnet_v2
timm/inception_v3
timm/inception_v4
timm/lambda_resnet26t
timm/lcnet_050
timm/lcnetv2_small
timm/legacy_seresnet18
timm/legacy_xception
timm/levit_128s
timm/lowformer_b0
timm/mobilenetv5_base
timm/mobilevit_xxs
timm/mvitv2_small_cls
timm/naflexvit_base_patch16_gap
timm/nasnetalarge
timm/nest_small_jx
timm/nextvit_small
timm/pit_ti_224
timm/pnasnet5large
timm/poolformerv2_s12
timm/pvt_v2_b0
timm/qwen3_vit_88m
timm/rdnet_tiny
timm/regnetx_002
timm/repghostnet_050
timm/repvit_m0_9
timm/res2net50_48w_2s
timm/resnest14d
timm/resnetv2_18
timm/rexnetr_130
timm/samvit_base_patch16_224
timm/selecsls42b
timm/sequencer2d_m
timm/shvit_s2
timm/skresnet34
timm/starnet_s100
timm/swiftformer_s
timm/swin_small_patch4_window7_224
timm/swinv2_cr_tiny_384
timm/swinv2_tiny_window8_256
timm/test_byobnet
timm/test_coatnet
timm/test_convnext
timm/test_efficientnet_evos
timm/test_mambaout
timm/test_nfnet
timm/test_resnet
timm/test_vit4
timm/test_vit_relpos
timm/tiny_vit_5m_224
timm/tnt_s_patch16_224
timm/tresnet_m
timm/twins_pcpvt_large
timm/vgg11
timm/visformer_small
timm/vit_base_mci_224
timm/vitamin_small_224
timm/volo_d1_224
timm/xception41p
timm/xcit_nano_12_p16_224
torchvision/alexnet
torchvision/convnext_tiny
torchvision/densenet121
torchvision/efficientnet_b0
torchvision/googlenet
torchvision/inception_v3
torchvision/maxvit_t
torchvision/mnasnet0_5
torchvision/mobilenet_v2
torchvision/mobilenet_v3_small
torchvision/regnet_x_400mf
torchvision/resnet18
torchvision/shufflenet_v2_x0_5
torchvision/squeezenet1_1
torchvision/swin_t
torchvision/swin_v2_t
torchvision/vit_b_16
""".split()
"""The quickest model of each family."""


@pytest.mark.parametrize("name", ZOO)
def test_conversion_is_exact(name: str):
    _, weights = check_by_name(name)
    assert weights > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which models?"),
        (["--match", "timm/test_vit4", "--match", "timm/resnet81", "--table", "zoo.md"], "did you mean 'timm/resnet"),
        (["--match", "timm/test_vit4", "--shard", "3/2"], "not '3/2'"),
        (["--match", "timm/test_vit4", "--shard", "0/2"], "not '0/2'"),
        (["--match", "timm/test_vit4", "--shard", "1"], "not '1'"),
        (["--match", "timm/test_vit4", "--workers", "0"], "--workers"),
        (["--match", "timm/test_vit4", "--memory", "0"], "--memory"),
        (["--match", "timm/test_vit4", "--all"], "which models?"),
        (["--match", "timm/test_vit4", "--table", "."], "is a directory"),
    ],
)
def test_what_can_not_be_checked_is_refused(arguments: list[str], message: str, tmp_path: Path):
    results = tmp_path / "new" / "zoo.csv"
    found = CliRunner().invoke(zoo.main, [*arguments, "--results", str(results)])
    assert found.exit_code == 2 and message in found.output, found.output
    assert not results.parent.exists()


def test_what_was_checked_is_not_checked_again_and_stands_in_the_table(tmp_path: Path):
    page, results = tmp_path / "new" / "zoo.md", tmp_path / "zoo.csv"
    where = ["--results", str(results), "--table", str(page)]
    command = [sys.executable, "-m", "tests.zoo", "--match", "timm/test_vit4", *where]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], check=False, capture_output=True, text=True)
    first, second = found.stdout.splitlines()
    assert first.startswith("1 to check, 0 already in ") and second.split()[:2] == ["timm/test_vit4", "pass"], found.stderr
    for count, selection in ((1, ["--match", "timm/test_vit4"]), (0, [])):
        page.unlink()
        again = CliRunner().invoke(zoo.main, [*selection, *where])
        assert (again.exit_code, again.output) == (0, f"0 to check, {count} already in {results}\n")
        assert "| timm.models.vision_transformer | 1 | 1 | 0 | 0 |" in page.read_text(encoding="utf-8")


def test_shards_are_all_models_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(zoo, "_side_by_side", lambda names, *limits: asked.extend(names) or ())
    for shard in ("1/3", "2/3", "3/3"):
        before = len(asked)
        arguments = ["--match", "timm/test_*", "--shard", shard, "--results", str(tmp_path / "zoo.csv")]
        assert CliRunner().invoke(zoo.main, arguments).exit_code == 0
        assert len(asked) > before
    assert sorted(asked) == [name for name in zoo.all_names() if name.startswith("timm/test_")]


def test_every_family_of_timm_is_there():
    families = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert families - {family(name) for name in ZOO} == set()


@pytest.mark.parametrize("name", ["timm/test_byobnet", "timm/test_vit", "timm/resnet18", "timm/swin_tiny_patch4_window7_224"])
def test_direct_feedback_is_exact(name: str):
    made = next(small(name))
    plain, images = made.model, made.inputs[0]
    expected_outputs, true = learn(copy.deepcopy(plain), [images])
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, "dfa", feedback="channel")
    found_outputs, found = learn(converted, [images])
    require_same_bits(found_outputs, expected_outputs, "dfa")
    assert found.keys() == true.keys()
    findings = fahooks.audit(copy.deepcopy(converted), images)
    assert findings.clean, str(findings)
    rules: Any = feedback_rules(converted)
    matrices = {name: rule.matrix.values.double() for name, rule in rules.items()}
    require_same_gradients(found, learn_directly(plain, images, matrices), "dfa")
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
    output = model.train()(images)
    error = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    total = (output * error).sum()
    for x, module, matrix in inputs:
        signal = (error @ matrix.t()).repeat_interleave(len(x) // len(error), 0)
        place = -1 if isinstance(module, nn.Linear) else 1
        total = total + (x.movedim(place, 1).flatten(2).sum(2) if x.dim() > 2 else x).mul(signal).sum()
    total.backward()
    leaves = {"input 0": images, **dict(model.named_parameters())}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
