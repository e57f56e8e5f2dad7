"""Which: patterns, types and functions that select layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import nn

from fahooks.plugins import near
from fahooks.surgery.report import EXCLUDED, NOT_INCLUDED
from fahooks.surgery.sites import ConversionError, Site, lineage

Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]"

REGEX = "re:"
"""What a name pattern that is a regular expression, and no glob, begins with."""


def reasons_unselected(sites: Sequence[Site], include: Any, exclude: Any) -> dict[str, str | None]:
    """Why each site is not selected, by name; None where it is."""
    included = _any_selector_test(include, sites, "include") if include is not None else lambda site: True
    excluded = _any_selector_test(exclude, sites, "exclude") if exclude is not None else lambda site: False
    return {s.name: EXCLUDED if excluded(s) else None if included(s) else NOT_INCLUDED for s in sites}


def _any_selector_test(selectors: Any, sites: Sequence[Site], role: str) -> Callable[[Site], bool]:
    tests = [selector_test(s, sites, role) for s in (selectors if isinstance(selectors, list | tuple) else [selectors])]
    return lambda site: any(test(site) for test in tests)


def selector_test(selector: Any, sites: Sequence[Site], role: str) -> Callable[[Site], bool]:
    """A test for sites; one that no site passes is an error, so that a misspelt name is never silent."""
    test = _site_test(selector, role)
    if not any(test(site) for site in sites):
        names = [site.name for site in sites]
        hint = near(selector, names) if isinstance(selector, str) else ""
        raise ConversionError(f"{role}: {_shown(selector)} matches none of the {len(sites)} layers{hint or _for_example(names)}")
    return test


def deciding_test(
    selector: Any, before: Sequence[tuple[Any, Callable[[Site], bool]]], sites: Sequence[Site], role: str
) -> Callable[[Site], bool]:
    """As `selector_test`, for selectors of which the first that matches decides: one that decides for no site is an error too.

    One that selects every site is none: it says what becomes of the rest, and there may be no rest.

    Arguments:
        selector: what selects.
        before: the selectors before it, with their tests.
        sites: what there is to select.
        role: what messages call it.
    """
    test = selector_test(selector, sites, role)
    takers = [next((place for place, (_, taken) in enumerate(before) if taken(site)), None) for site in sites if test(site)]
    if len(takers) < len(sites) and None not in takers:
        names = [_shown(other) for place, (other, _) in enumerate(before) if place in takers]
        take = "takes" if len(names) == 1 else "take"
        what = f"{' and '.join(names)} before it {take} all that it matches"
        raise ConversionError(f"{role}: {_shown(selector)} decides for no layer: {what}; put it first, or leave it out")
    return test


def _site_test(selector: Any, role: str) -> Callable[[Site], bool]:
    if isinstance(selector, str) and selector.startswith(REGEX):
        try:
            selector = re.compile(selector.removeprefix(REGEX))
        except re.error as error:
            raise ConversionError(f"{role}: {selector!r} is no regular expression: {error}") from error
    if isinstance(selector, str):
        return lambda site: any(fnmatch.fnmatchcase(name, selector) for name in lineage(site.name))
    if isinstance(selector, re.Pattern):
        return lambda site: selector.search(site.name) is not None
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        return lambda site: any(isinstance(module, selector) for module in site.around)
    if callable(selector):
        return lambda site: bool(selector(site.name, site.module))
    raise ConversionError(
        f"{role}: expected a name pattern, a compiled regex, a module type or a function (name, module) -> bool, got {selector!r}"
    )


def _shown(selector: Any) -> str:
    return repr(selector if isinstance(selector, str) else getattr(selector, "__name__", selector))


def _for_example(names: Sequence[str]) -> str:
    return f"; layers are named like {', '.join(map(repr, names[:3]))}" if names else ""
