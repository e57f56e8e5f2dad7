from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fahooks.hooks import Alignment, FreezeSigns
from fahooks.plugins import Doubtful, InputError
from fahooks.recipe import Recipe
from fahooks.surgery import backprop, feedback_layers
from fahooks.training.setup import prepare

from .conftest import stored

Tiny = Callable[..., Recipe]


def test_everything_of_a_run_is_made(tiny: Tiny):
    setup = prepare(tiny())
    assert (setup.train.images, setup.validation.images, setup.test.images) == (160, 60, 360)
    assert list(feedback_layers(setup.model)) == setup.report.converted == ["conv1", "conv2", "dense", "output"]
    assert {id(p) for p in setup.model.parameters()} == {id(p) for g in setup.optimizer.param_groups for p in g["params"]}
    assert stored(setup.train).dtype == torch.uint8
    assert setup.model(next(iter(setup.train)).images).shape == (32, 10)


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


def test_what_does_nothing_in_a_run_is_warned_of(tiny: Tiny):
    as_backprop = "the run learns as by backpropagation$"
    with pytest.warns(Doubtful, match=f"^only conv1 has a rule, and sends no error to the images below: {as_backprop}"):
        setup = prepare(tiny("feedback=[{match: conv1, rule: fa}]"))
    batch = next(iter(setup.train))
    gradients = []
    for context in (nullcontext, lambda: backprop(setup.model)):
        with context():
            loss = setup.model.eval()(batch.images).square().sum()
            gradients.append(torch.autograd.grad(loss, list(setup.model.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for used in ("[{match: conv2, rule: fa}]", "[{match: output, rule: fa}, {match: conv1, rule: usf}]", "[{rule: bp}]"):
        prepare(tiny(f"feedback={used}"))
    prepare(tiny("feedback=[{rule: dfa, at: conv1}]"))
    late = ("hooks=[{name: dale}, {name: freeze_signs, after: 4}]", "train.max_steps=3")
    with pytest.warns(Doubtful, match="^hook 'freeze_signs' does nothing: it begins at step 4, and train.max_steps ends the run"):
        prepare(tiny(*late))
    prepare(tiny(late[0], "train.max_steps=4"))
    with pytest.raises(
        InputError, match="^hook 'freeze_signs' does nothing: it begins at step 16, and training has no more than 15$"
    ):
        prepare(tiny("hooks=[{name: freeze_signs, after: 16}]"))


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


def test_a_recipe_that_gives_no_layer_a_rule_is_warned_of(tiny: Tiny):
    with pytest.warns(Doubtful, match="^no layer has a rule: the run learns as by backpropagation, and "):
        prepare(tiny("feedback=[{match: output, rule: bp}]"))
    prepare(tiny("feedback=[{rule: bp}]"))
    prepare(tiny("feedback=[{match: output, rule: bp}, {rule: bp}]"))
    prepare(tiny("feedback=[{match: output, rule: fa}]"))


def test_a_pattern_that_matches_no_layer_is_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="'cnov1' matches none of the 4 layers.*'conv1'"):
        prepare(tiny("feedback=[{match: cnov1, rule: fa}]"))


def test_options_that_do_not_fit_the_images_are_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="at least 4x4"):
        prepare(tiny("model.image_size=2"))


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


def test_a_model_is_tried_on_no_more_images_than_a_pass_has(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    """Else a batch that has no room in memory as a whole could not be trained in several passes."""
    seen: list[int] = []
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: (seen.append(len(x)), original(self, x))[1])
    prepare(tiny("train.accumulate=4", "feedback=[{rule: bp}]"))
    assert set(seen) == {8}
    seen.clear()
    prepare(tiny("feedback=[{rule: bp}]"))
    assert set(seen) == {32}
