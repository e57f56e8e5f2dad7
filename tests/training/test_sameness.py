from __future__ import annotations

import pytest

from fahooks.plugins import InputError
from fahooks.recipe import load
from fahooks.training.sameness import FREE, check_same

BEFORE = load("quickstart").model_dump(mode="json")


def test_a_changed_recipe_is_refused_with_what_changed_and_what_to_do():
    now = load("quickstart", ("optim.lr=0.1", "name=other", "data.root=/elsewhere")).model_dump(mode="json")
    with pytest.raises(InputError) as caught:
        check_same(BEFORE, now, "'a' was made", "look elsewhere")
    assert str(caught.value).splitlines() == [
        "'a' was made with another recipe (before -> now):",
        "  optim.lr: 0.0005 -> 0.1",
        "look elsewhere",
    ]
    with pytest.raises(InputError, match="  name: 'quickstart' -> 'other'\n"):
        check_same(BEFORE, now, "'a' was made", free=())
    check_same(BEFORE, now, "'a' was made", free=(*FREE, "optim"))


def test_keys_that_recipes_did_not_have_yet_are_at_their_defaults():
    old = {key: value for key, value in BEFORE.items() if key != "probes"}
    check_same(old, load("quickstart", ("probes.every=null",)).model_dump(mode="json"), "it was made")
    with pytest.raises(InputError, match=r"probes.every: null -> 7|probes.every: None -> 7"):
        check_same(old, load("quickstart", ("probes.every=7",)).model_dump(mode="json"), "it was made")
