"""Comparing recipes: which keys differ, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fahooks.recipe.tree import ABSENT, Key, dotted, shown

NOTHING = "nothing"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, apart_from: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """The keys whose values differ, with both values as text, "nothing" where a recipe does not have the key.

    Arguments:
        before: a recipe as plain data, such as `recipe.model_dump(mode="json")` gives.
        now: another.
        apart_from: dotted keys that may differ, with all below them.
    """
    there, here = dict(_leaves(before)), dict(_leaves(now))
    return {
        dotted(key): (_said(there, key), _said(here, key))
        for key in {**there, **here}
        if there.get(key, ABSENT) != here.get(key, ABSENT)
        and not any(dotted(key) == name or dotted(key).startswith(f"{name}.") for name in apart_from)
    }


def _leaves(value: Any, at: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is no section, with its key; of a section without keys there is nothing to say."""
    if isinstance(value, dict) or (isinstance(value, list) and value):
        for part, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(child, (*at, part))
    else:
        yield at, value


def _said(leaves: Mapping[Key, Any], key: Key) -> str:
    return shown(leaves[key]) if key in leaves else NOTHING
