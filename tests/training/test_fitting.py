from __future__ import annotations

import pytest
import torch
from torch import nn

from fahooks import plugins
from fahooks.recipe import Recipe, Source, load
from fahooks.training.fitting import misfits

TEXT = """
name: small
model: {model}
feedback: {feedback}
hooks: {hooks}
data: {{dataset: mnist, root: nowhere, batch_size: 10, validation: 100}}
optim: {{name: adam, lr: 0.001}}
train: {{epochs: 1}}
"""

ALL = "[{rule: fa}]"


def recipe(model: str = "{name: paper/mnist}", feedback: str = ALL, hooks: str = "[]") -> Recipe:
    return load(Source("r.yaml", TEXT.format(model=model, feedback=feedback, hooks=hooks)))


@pytest.mark.parametrize(
    ("given", "key", "what"),
    [
        (
            {"feedback": "[{match: outptu, rule: bp}, {rule: fa}]"},
            ("feedback", 0, "match"),
            "'outptu' matches none of the 4 layers",
        ),
        ({"feedback": "[{rule: bp}, {match: 're:(', rule: fa}]"}, ("feedback", 1, "match"), "'re:(' is no regular expression: "),
        (
            {"feedback": "[{rule: fa}, {match: output, rule: bp}]"},
            ("feedback", 1, "match"),
            "'output' decides for no layer: '*' before it takes all that it matches; put it first, or leave it out",
        ),
        ({"feedback": "[{rule: dfa, at: 'block?'}]"}, ("feedback", 0, "at"), "'block?' matches none of the "),
        ({"feedback": "[{rule: dfa, at: [dense, x]}]"}, ("feedback", 0, "at"), "'x' matches none of the "),
        ({"hooks": "[{name: manhattan, match: 'nox*'}]"}, ("hooks", 0, "match"), "'nox*' matches none of the 4 layers"),
        ({"hooks": "[{name: manhattan, match: [dense, nox]}]"}, ("hooks", 0, "match"), "'nox' matches none of the 4 layers"),
        ({"model": "{name: timm/resnet18, block: 3}"}, ("model",), "model 'timm/resnet18' could not be built with "),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, str], key: tuple[str | int, ...], what: str):
    ((found, words),) = misfits(recipe(**given))
    assert found == key
    assert words.startswith(what)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"feedback": "[{match: output, rule: bp}, {match: 're:^conv', rule: usf}, {rule: dfa, at: [conv1, dense]}]"},
        {"hooks": "[{name: manhattan, match: [dense, 'conv*']}, {name: dale}]"},
        {"model": "{name: timm/resnet18}", "feedback": "[{match: fc, rule: bp}, {rule: dfa, at: 'layer?.?'}]"},
    ],
)
def test_what_fits_is_not_named(given: dict[str, str]):
    assert list(misfits(recipe(**given))) == []


def test_a_hook_that_begins_after_the_last_step_is_named_where_the_images_are_counted():
    def found(after: int, *overrides: str) -> list[tuple[tuple[str | int, ...], str]]:
        text = TEXT.format(model="{name: paper/mnist}", feedback=ALL, hooks=f"[{{name: freeze_signs, after: {after}}}]")
        return list(misfits(load(Source("r.yaml", text), overrides)))

    says = "hook 'freeze_signs' does nothing: it begins at step 42, and training has no more than 41"
    assert found(42, "data.limit=405") == [(("hooks", 0), says)]
    assert found(41, "data.limit=405") == found(42) == []


def test_a_model_that_the_meta_device_can_not_hold_is_built_beside_the_random_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plugins.models, "_entries", dict(plugins.models._entries))

    @plugins.models.register("mine")
    def mine(*, classes: int = 10, image_size: int = 4) -> nn.Module:
        # Not to be built on the meta device.
        return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, int(torch.ones(1) * classes)))

    before = torch.get_rng_state()
    assert list(misfits(recipe("{name: mine}"))) == []
    ((key, _),) = misfits(recipe("{name: mine}", "[{match: '2', rule: fa}]"))
    assert key == ("feedback", 0, "match")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_end_is_refused_before_it_takes_all_memory():
    ((key, words),) = misfits(recipe("{name: timm/resnet18, layers: [100000000, 1, 1, 1]}"))
    assert key == ("model",) and "more than 100,000 modules" in words
