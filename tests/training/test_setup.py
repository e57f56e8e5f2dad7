from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fahooks.plugins import InputError
from fahooks.recipe import Recipe
from fahooks.surgery import feedback_layers
from fahooks.training.setup import prepare, resolve

Tiny = Callable[..., Recipe]


def test_everything_of_a_run_is_made(tiny: Tiny):
    setup = prepare(tiny())
    assert (setup.train.images, setup.validation.images, setup.test.images) == (160, 60, 360)
    assert list(feedback_layers(setup.model)) == setup.report.converted == ["conv1", "conv2", "dense", "output"]
    assert {id(p) for p in setup.model.parameters()} == {id(p) for g in setup.optimizer.param_groups for p in g["params"]}
    assert setup.train.pixels.dtype == torch.uint8
    assert setup.model(next(setup.train.epoch(0)).images).shape == (32, 10)


def test_images_are_normalised_by_those_that_are_trained_on(tiny: Tiny):
    setup = prepare(tiny())
    images = torch.cat([batch.images for batch in setup.train.in_order()])
    assert abs(images.mean().item()) < 1e-5 and abs(images.std(correction=0).item() - 1) < 1e-4
    for other in (setup.validation, setup.test):
        assert torch.equal(other.mean, setup.train.mean) and torch.equal(other.std, setup.train.std)


def test_the_seed_decides_weights_feedback_and_split(tiny: Tiny):
    first, again, other = (prepare(tiny(f"seed={s}")) for s in (0, 0, 1))
    state, same, different = (s.model.state_dict() for s in (first, again, other))
    assert all(torch.equal(value, same[key]) for key, value in state.items())
    for key in ("conv1.weight", "conv1.feedback.matrix"):
        assert not torch.equal(state[key], different[key])
    assert torch.equal(first.validation.pixels, again.validation.pixels)
    assert not torch.equal(first.validation.pixels, other.validation.pixels)


def test_all_rules_start_from_the_same_weights(tiny: Tiny):
    bp, fa = (prepare(tiny(f"feedback=[{{rule: {rule}}}]")).model.state_dict() for rule in ("bp", "fa"))
    assert bp and all(torch.equal(value, fa[key]) for key, value in bp.items())


def test_rules_go_where_their_patterns_say(tiny: Tiny):
    setup = prepare(tiny("feedback=[{match: output, rule: bp}, {match: 'conv*', rule: fa, gain: 2.0}, {rule: usf_sn}]"))
    rules = {layer.name: layer.rule for layer in setup.report.layers}
    assert rules == {"conv1": "fa", "conv2": "fa", "dense": "usf_sn", "output": ""}


def test_a_pattern_that_matches_no_layer_is_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="'cnov1' matches none of the 4 layers.*'conv1'"):
        prepare(tiny("feedback=[{match: cnov1, rule: fa}]"))


def test_channels_last_and_bf16_reach_model_and_images(tiny: Tiny):
    setup = prepare(tiny("train.channels_last=true", "train.precision=bf16"))
    assert setup.model.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    with setup.autocast:
        assert setup.forward(next(setup.train.epoch(0)).images).dtype == torch.bfloat16


def test_threads_are_set_only_if_given(tiny: Tiny):
    torch.set_num_threads(2)
    prepare(tiny("train.threads=null"))
    assert torch.get_num_threads() == 2
    prepare(tiny("train.threads=1"))
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="torch finds no GPU here: use train.device=cpu"):
        prepare(tiny("train.device=cuda"))
    assert prepare(tiny("train.device=auto")).device.type == "cpu"


def test_options_that_do_not_fit_the_images_are_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="at least 4x4"):
        prepare(tiny("model.image_size=2"))


def test_automatic_choices_are_written_into_the_recipe(tiny: Tiny):
    assert tiny().data.loader == "auto"
    assert resolve(tiny()).data.loader == prepare(tiny()).recipe.data.loader == "memory"
    assert resolve(resolve(tiny())) == resolve(tiny())
