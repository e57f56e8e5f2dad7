from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fahooks.data import load as load_data
from fahooks.plugins import rules
from fahooks.recipe import Recipe, Source, load
from fahooks.training.resolution import resolve
from fahooks.training.setup import prepare

Tiny = Callable[..., Recipe]


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


def test_the_options_of_augmentations_are_written_out(tiny: Tiny):
    recipe = prepare(tiny("data.augment=[{crop: {size: 7}}, {flip: {}}]")).recipe
    assert recipe.data.augment == [{"crop": {"size": 7, "padding": 0}}, {"flip": {}}]
    assert load(Source("resolved.yaml", recipe.as_yaml())) == recipe
