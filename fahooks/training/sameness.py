"""Whether what was begun is of the recipe that is asked for now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from fahooks.plugins import InputError
from fahooks.recipe import Recipe
from fahooks.recipe.comparison import differences

PLACES = ("data.root", "data.download", "data.dataset_options.path", "data.loader_options.folder", "data.loader_options.workers")
"""Keys that say where the images of a run lie, and who fetches them, not which they are."""

FREE = ("name", "summary", "paper", "checkpoint", "train.distributed", *PLACES)
"""Keys of a recipe that have no part in what a run computes: they may change before it goes on."""


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], what: str, todo: str = "", free: Sequence[str] = FREE) -> None:
    """Refuse to take what was made from another recipe for what `now` asks for.

    Arguments:
        before: the recipe that it was made from, as plain data.
        now: the one that is asked for.
        what: the beginning of the message, as in "the run in 'a' was begun".
        todo: its end; by default how to go on.
        free: dotted keys that may differ, with all below them.

    Raises:
        InputError: others differ; a line each.
    """
    with suppress(ValidationError):  # written out again, for the keys that recipes did not have yet when it was begun
        before = Recipe.model_validate(before).model_dump(mode="json")
    changed = differences(before, now, apart_from=free)
    if changed:
        lines = [f"  {key}: {there} -> {here}" for key, (there, here) in changed.items()]
        todo = todo or "put the recipe back, or start a new run, in another folder and without --resume"
        raise InputError("\n".join([f"{what} with another recipe (before -> now):", *lines, todo]))
