from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data import Stream
from fahooks.data import load as load_data
from fahooks.data.decoding import CorruptFileWarning
from fahooks.data.memory import MemoryLoader, MemoryStream
from fahooks.hooks import Alignment, FreezeSigns
from fahooks.plugins import InputError, rules
from fahooks.recipe import Recipe, Source, load
from fahooks.surgery import feedback_layers
from fahooks.training import setup as preparation
from fahooks.training.setup import prepare, resolve

Tiny = Callable[..., Recipe]


def stored(stream: Stream) -> torch.Tensor:
    """The pixels that the memory loader holds."""
    assert isinstance(stream, MemoryStream)
    return stream.pixels


def test_everything_of_a_run_is_made(tiny: Tiny):
    setup = prepare(tiny())
    assert (setup.train.images, setup.validation.images, setup.test.images) == (160, 60, 360)
    assert list(feedback_layers(setup.model)) == setup.report.converted == ["conv1", "conv2", "dense", "output"]
    assert {id(p) for p in setup.model.parameters()} == {id(p) for g in setup.optimizer.param_groups for p in g["params"]}
    assert stored(setup.train).dtype == torch.uint8
    assert setup.model(next(iter(setup.train)).images).shape == (32, 10)


def test_images_are_normalised_by_those_that_are_trained_on(tiny: Tiny):
    setup = prepare(tiny())
    images = torch.cat([batch.images for batch in setup.train])
    assert abs(images.mean().item()) < 1e-5 and abs(images.std(correction=0).item() - 1) < 1e-4
    for other in (setup.validation, setup.test):
        assert torch.equal(other.mean, setup.train.mean) and torch.equal(other.std, setup.train.std)


def test_the_seed_decides_weights_feedback_and_split(tiny: Tiny):
    first, again, other = (prepare(tiny(f"seed={s}")) for s in (0, 0, 1))
    state, same, different = (s.model.state_dict() for s in (first, again, other))
    assert all(torch.equal(value, same[key]) for key, value in state.items())
    for key in ("conv1.weight", "conv1.feedback.matrix"):
        assert not torch.equal(state[key], different[key])
    assert torch.equal(stored(first.validation), stored(again.validation))
    assert not torch.equal(stored(first.validation), stored(other.validation))


def test_all_rules_start_from_the_same_weights(tiny: Tiny):
    bp, fa = (prepare(tiny(f"feedback=[{{rule: {rule}}}]")).model.state_dict() for rule in ("bp", "fa"))
    assert bp and all(torch.equal(value, fa[key]) for key, value in bp.items())


def test_rules_go_where_their_patterns_say(tiny: Tiny):
    setup = prepare(tiny("feedback=[{match: output, rule: bp}, {match: 'conv*', rule: fa, gain: 2.0}, {rule: usf_sn}]"))
    rules = {layer.name: layer.rule for layer in setup.report.layers}
    assert rules == {"conv1": "fa", "conv2": "fa", "dense": "usf_sn", "output": ""}


def test_hooks_are_attached_for_the_whole_training(tiny: Tiny):
    hooks = "hooks=[{name: freeze_signs, after: 0.5}, {name: alignment, match: [dense, output]}]"
    attached = prepare(tiny(hooks)).hooks
    assert attached is not None
    (freeze, everywhere), (alignment, some) = attached.hooks
    assert isinstance(freeze, FreezeSigns) and isinstance(alignment, Alignment)
    assert freeze.start == round(0.5 * 3 * 5)
    assert (list(everywhere), list(some)) == (["conv1", "conv2", "dense", "output"], ["dense", "output"])
    again = prepare(tiny(hooks)).hooks
    assert again is not None and torch.equal(again.hooks[1][0].recall("dense"), alignment.recall("dense"))
    with pytest.raises(InputError, match="hook 'alignment': match: 'dens' matches none of the 4 layers"):
        prepare(tiny("hooks=[{name: alignment, match: dens}]"))


def test_rules_that_learn_are_attached_and_others_need_nothing(tiny: Tiny):
    assert prepare(tiny()).hooks is None
    attached = prepare(tiny("feedback=[{match: dense, rule: kp}, {rule: fa}]")).hooks
    assert attached is not None and list(attached.rules) == ["dense"] and attached.hooks == []


def test_a_pattern_that_matches_no_layer_is_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="'cnov1' matches none of the 4 layers.*'conv1'"):
        prepare(tiny("feedback=[{match: cnov1, rule: fa}]"))


def test_channels_last_and_bf16_reach_model_and_images(tiny: Tiny):
    setup = prepare(tiny("train.channels_last=true", "train.precision=bf16"))
    assert setup.model.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    with setup.autocast:
        assert setup.forward(next(iter(setup.train)).images).dtype == torch.bfloat16


def test_threads_are_set_only_if_given(tiny: Tiny):
    torch.set_num_threads(2)
    prepare(tiny("train.threads=null"))
    assert torch.get_num_threads() == 2
    prepare(tiny("train.threads=1"))
    assert torch.get_num_threads() == 1


def test_float32_is_rounded_where_that_is_asked_for_and_nowhere_else(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    prepare(tiny())
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
    with pytest.raises(InputError, match="train.precision=tf32 is a precision of GPUs, and this runs on the CPU"):
        prepare(tiny("train.precision=tf32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="torch finds no GPU here: use train.device=cpu"):
        prepare(tiny("train.device=cuda"))
    assert prepare(tiny("train.device=auto")).device.type == "cpu"


def test_options_that_do_not_fit_the_images_are_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="at least 4x4"):
        prepare(tiny("model.image_size=2"))


def test_choices_and_defaults_are_written_into_the_recipe(tiny: Tiny, tmp_path: Path):
    overrides = (
        "data.root=here",
        "model.classes=12",
        "feedback=[{match: output, rule: usf, scale: 0.5}, {rule: usf}]",
        "hooks=[{name: dale}]",
    )
    recipe = tiny(*overrides)
    digits = load_data("digits", root=tmp_path, download=False)
    resolved = resolve(recipe, digits)
    assert (recipe.data.loader, resolved.data.loader) == ("auto", "memory")
    assert resolved.data.root == os.path.abspath("here")
    assert resolved.model.options == {
        "init": "fan_in",
        "activation": "relu",
        "in_channels": 1,
        "image_size": 8,
        "classes": 12,
    }
    assert [f.options["scale"] for f in resolved.feedback] == [0.5, None]
    assert all(set(f.options) == set(rules.get("usf").options) for f in resolved.feedback)
    assert [(h.name, h.match, h.options) for h in resolved.hooks] == [("dale", None, {"excitatory": None, "margin": 1e-8})]
    assert resolve(resolved, digits) == resolved == prepare(recipe).recipe
    assert load(Source("resolved.yaml", resolved.as_yaml())) == resolved


def test_the_model_is_made_for_the_images_as_it_sees_them(tiny: Tiny):
    setup = prepare(tiny("data.augment=[{crop: {size: 6}}, {flip: {}}]"))
    assert setup.recipe.model.options["image_size"] == 6
    for stream in (setup.train, setup.validation, setup.test):
        assert next(iter(stream)).images.shape[1:] == (1, 6, 6)
    batch = next(iter(setup.train))
    assert batch.images.shape == (32, 1, 6, 6)
    assert setup.model(batch.images).shape == (32, 10)
    centre = stored(setup.validation)[:, :, 1:7, 1:7].float()
    evaluated = torch.cat([batch.images for batch in setup.validation])
    assert torch.equal(evaluated, (centre - setup.validation.mean) / setup.validation.std)


def test_augmentation_follows_the_seed_of_the_recipe_and_the_epoch(tiny: Tiny):
    augment = "data.augment=[{crop: {padding: 2}}]"
    first, again, other = (prepare(tiny(augment, f"seed={s}")).train for s in (0, 0, 1))
    pixels, index = stored(first)[:50], torch.arange(50)
    assert torch.equal(first.view.augment.train(pixels, 1, index), again.view.augment.train(pixels, 1, index))
    assert not torch.equal(first.view.augment.train(pixels, 1, index), other.view.augment.train(pixels, 1, index))
    assert not torch.equal(first.view.augment.train(pixels, 1, index), first.view.augment.train(pixels, 2, index))


def test_the_options_of_augmentations_are_written_out(tiny: Tiny):
    recipe = prepare(tiny("data.augment=[{crop: {size: 7}}, {flip: {}}]")).recipe
    assert recipe.data.augment == [{"crop": {"size": 7, "padding": 0}}, {"flip": {}}]
    assert load(Source("resolved.yaml", recipe.as_yaml())) == recipe


def test_a_crop_that_does_not_fit_the_images_is_one_line(tiny: Tiny):
    with pytest.raises(InputError, match="a crop of 9x9 pixels does not fit into images of 8x8 with padding 0"):
        prepare(tiny("data.augment=[{crop: {size: 9}}]"))


def test_large_images_are_evaluated_in_batches_as_they_are_trained_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    assert [prepare(tiny()).validation.view.batch_size, prepare(tiny()).train.view.batch_size] == [500, 32]
    monkeypatch.setattr(preparation, "SMALL_IMAGE", 63)
    assert prepare(tiny()).test.view.batch_size == prepare(tiny()).validation.view.batch_size == 32


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("torchvision/resnet18", "does not run on images of shape 1x8x8 (CxHxW): RuntimeError: "),
        ("timm/vit_tiny_patch16_224", "does not run on images of shape 1x8x8 (CxHxW): AssertionError: "),
        ("paper/mnist, classes: 9", "must give logits of shape (32, 10) for 32 images of shape 1x8x8 (CxHxW), and gave (32, 9)"),
    ],
)
def test_a_model_that_does_not_take_the_images_is_one_line(tiny: Tiny, model: str, reason: str):
    with pytest.raises(InputError) as caught:
        prepare(tiny(f"model={{name: {model}}}"))
    assert str(caught.value).startswith(f"model {model.split(',')[0]!r} {reason}")
    assert "\n" not in str(caught.value)


def test_trying_a_model_leaves_no_trace(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny("model={name: timm/test_resnet}")
    tried = prepare(recipe)
    after = torch.get_rng_state()
    monkeypatch.setattr(preparation, "_try", lambda *arguments: None)
    untried = prepare(recipe).model
    assert torch.equal(after, torch.get_rng_state())
    expected = untried.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tried.model.state_dict().items())
    assert [m.training for m in tried.model.modules()] == [m.training for m in untried.modules()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small images of two classes, half of them bright."""
    for number in range(40):
        label = "ab"[number % 2]
        (tmp_path / "mine" / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 9), 100 + 5 * number).save(tmp_path / "mine" / label / f"{number}.png")
    return tmp_path


def of_files(folder: Path, *more: str) -> tuple[str, ...]:
    options = "data.dataset_options={path: mine, size: 8, channels: 1, test: 0.25}"
    return ("data.dataset=imagefolder", options, f"data.root={folder}", "data.validation=6", "data.limit=null", *more)


def test_a_folder_of_images_is_trained_on(tiny: Tiny, folder: Path):
    setup = prepare(tiny(*of_files(folder)))
    assert (setup.train.images, setup.validation.images, setup.test.images) == (24, 6, 10)
    assert setup.recipe.data.loader == "memory"
    assert setup.choices["data.loader"].startswith("memory: decoded, its 40 images take 0.00 GB")
    assert setup.recipe.data.dataset_options == {"path": "mine", "size": 8, "channels": 1, "test": 0.25, "test_seed": 0}
    assert load(Source("resolved.yaml", setup.recipe.as_yaml())) == setup.recipe


def test_all_loaders_give_the_same_batches(tiny: Tiny, folder: Path):
    augment = "data.augment=[{random_resized_crop: {size: 8}}, {flip: {}}]"
    memory = prepare(tiny(*of_files(folder, augment, "data.loader=memory")))
    threads = prepare(tiny(*of_files(folder, augment, "data.loader=torchvision", "data.loader_options.workers=2")))
    assert threads.choices == {} and threads.recipe.data.loader_options == {"workers": 2}
    for one, other in ((memory.train, threads.train), (memory.validation, threads.validation), (memory.test, threads.test)):
        for stream in (one, other):
            stream.set_epoch(3)
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours.images, theirs.images) and torch.equal(ours.index, theirs.index)


def test_a_corrupt_file_is_refused_or_skipped_as_the_recipe_says(tiny: Tiny, folder: Path):
    for file in sorted((folder / "mine" / "a").iterdir())[:2]:
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"\.png can not be decoded .*data.corrupt=skip"):
        prepare(tiny(*of_files(folder)))
    with pytest.warns(CorruptFileWarning, match="skipped"):
        setup = prepare(tiny(*of_files(folder, "data.corrupt=skip")))
        streams = (setup.train, setup.validation, setup.test)
        assert sum(int(batch.valid.sum()) for stream in streams for batch in stream) == 38


def test_a_loader_that_does_not_work_here_is_an_error_with_the_way_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MemoryLoader, "available", lambda: "memory is not installed: pip install memory")
    with pytest.raises(InputError, match="data.loader=memory does not work here: memory is not installed: pip install memory"):
        prepare(tiny("data.loader=memory"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.dataset_options={sise: 3}"], "data.dataset_options.sise: dataset 'digits' has no such option"),
        (["data.dataset=imagefolder"], "data.dataset_options.path: is missing"),
        (["data.dataset=imagefolder", "data.dataset_options={path: 3}"], "data.dataset_options.path: must be a string"),
        (["data.dataset=imagefolder", "data.dataset_options={path: x, download: true}"], "has no such option"),
        (["data.loader_options={workers: 3}"], "data.loader_options: needs data.loader to be one by name, and not auto"),
        (["data.loader=torchvision", "data.loader_options={workers: 0}"], "workers must be positive .got 0."),
        (["data.loader=torchvision", "data.loader_options={worker: 1}"], "no such option .got 1. - did you mean 'workers'"),
        (["data.loader=memory", "data.loader_options=3"], "data.loader_options: must be a mapping"),
        (["data.corrupt=ignore"], "data.corrupt: must be 'refuse' or 'skip'"),
        (["data.augment=[{flip: {}}, {center_crop: {size: 4}}]"], "must be the first step"),
    ],
)
def test_options_of_datasets_and_loaders_are_checked(tiny: Tiny, overrides: list[str], problem: str):
    with pytest.raises(InputError, match=problem):
        prepare(tiny(*overrides))


def test_a_last_batch_of_one_image_is_refused_where_batch_norm_can_not_learn_from_it(tiny: Tiny):
    lonely = ("data.limit=221", "data.batch_size=32", "data.validation=60")  # 161 images: five batches of 32, and one of 1
    with pytest.raises(InputError, match="161 images in batches of 32 leave a pass with a single one"):
        prepare(tiny("model={name: timm/resnet18}", *lonely))
    assert prepare(tiny(*lonely)).train.images == 161, "control: a model without batch norm can"
    setup = prepare(tiny("model={name: timm/resnet18}", "data.limit=222"))
    assert all(int(value) == 0 for key, value in setup.model.state_dict().items() if key.endswith("num_batches_tracked"))
