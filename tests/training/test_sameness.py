from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from fahooks.plugins import InputError
from fahooks.recipe import Recipe, load
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


def leaves(kind: Any, at: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted keys of the schema that hold no section; a list of sections has the keys of one."""
    sections = list(sections_in(kind))
    if not sections:
        yield ".".join(at)
    for section in sections:
        for name, field in section.model_fields.items():
            yield from leaves(field.annotation, (*at, name))


def sections_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from sections_in(part)


MAY_CHANGE = {
    "name": True,
    "summary": True,
    "paper.table": True,
    "paper.row": True,
    "paper.column": True,
    "paper.error": True,
    "model.name": False,
    "feedback.match": False,
    "feedback.rule": False,
    "hooks.name": False,
    "hooks.match": False,
    "data.dataset": False,
    "data.dataset_options": False,
    "data.root": True,
    "data.download": True,
    "data.loader": False,
    "data.loader_options": False,
    "data.batch_size": False,
    "data.validation": False,
    "data.limit": False,
    "data.augment": False,
    "data.corrupt": False,
    "optim.name": False,
    "optim.lr": False,
    "optim.weight_decay": False,
    "optim.betas": False,
    "optim.momentum": False,
    "optim.nesterov": False,
    "schedule.name": False,
    "schedule.warmup": False,
    "schedule.every": False,
    "schedule.gamma": False,
    "train.epochs": False,
    "train.max_steps": False,
    "train.precision": False,
    "train.channels_last": False,
    "train.compile": False,
    "train.accumulate": False,
    "train.clip_norm": False,
    "train.label_smoothing": False,
    "train.ema": False,
    "train.distributed": True,
    "train.sync_batchnorm": False,
    "train.device": False,
    "train.threads": False,
    "probes.every": False,
    "checkpoint.every": True,
    "checkpoint.minutes": True,
    "checkpoint.keep": True,
    "seed": False,
}
"""Whether a run goes on where that key has another value than it was begun with: whoever adds a key to the schema decides."""


def test_it_is_decided_for_every_key_of_a_recipe_whether_it_may_change():
    assert set(leaves(Recipe)) == set(MAY_CHANGE)


# Options too, which the schema does not know.
@pytest.mark.parametrize(
    ("key", "may_change"),
    [
        *MAY_CHANGE.items(),
        *((f"{name}.option", False) for name in ("model", "feedback", "hooks", "data.dataset_options", "data.loader_options")),
        *((name, True) for name in ("data.dataset_options.path", "data.loader_options.folder", "data.loader_options.workers")),
    ],
)
def test_a_run_goes_on_with_another_value_of_a_key_or_not(key: str, may_change: bool):
    paper = {"table": 1, "row": "FA", "column": "mnist", "error": 1.0}
    begun = {**copy.deepcopy(BEFORE), "hooks": [{"name": "constant_norm", "match": None}], "paper": paper}
    now = copy.deepcopy(begun)
    *path, last = key.split(".")
    section: Any = now
    for name in path:
        section = section[name][0] if isinstance(section[name], list) else section[name]
    section[last] = "another value"
    if may_change:
        check_same(begun, now, "it was begun")
    else:
        with pytest.raises(InputError, match="another value"):
            check_same(begun, now, "it was begun")
    check_same(begun, begun, "control: it was begun")
