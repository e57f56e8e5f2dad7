"""Whether the patterns of a recipe fit its model: tried without data, and mostly without memory for weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fahooks import models, plugins
from fahooks.hooks.attachment import check_begins
from fahooks.plugins import InputError
from fahooks.recipe import Hook, Key, Recipe, RecipeError, Source, find, load_marked
from fahooks.rules.direct import FromOutput
from fahooks.surgery.selection import deciding_test, selector_test
from fahooks.surgery.sites import Site, find_blocks, find_sites


def load_fitting(source: Source | str, overrides: Sequence[str] = (), *, here: bool = True) -> Recipe:
    """As `fahooks.recipe.load`; and every pattern in the recipe matches a layer of its model.

    Arguments:
        source: what `find` returned, or a name for it.
        overrides: "dotted.key=value" each.
        here: whether it is trained on this machine, and the folder of its data has to be there.

    Raises:
        RecipeError: every problem in it, one a line, with the place where it was written.
        InputError: the recipe does not exist.
    """
    recipe, tree = load_marked(find(source) if isinstance(source, str) else source, overrides, here=here)
    for key, what in misfits(recipe):
        tree.problem(key, what)
    if tree.problems:
        raise RecipeError(tree.problems)
    return recipe


def misfits(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """The patterns that match nothing in the model, and a model that can not be built: each key with what is wrong there."""
    try:
        model = _model(recipe)
    except InputError as error:
        # A registered model may be one that can be built only with what the images tell.
        if recipe.model.name not in plugins.models:
            yield ("model",), str(error)
        return
    sites = list(find_sites(model))
    before: list[tuple[str, Callable[[Site], bool]]] = []
    for index, entry in enumerate(recipe.feedback):
        try:
            before.append((entry.match, deciding_test(entry.match, before, sites, "match")))
        except InputError as error:
            yield ("feedback", index, "match"), str(error).removeprefix("match: ")
        if "at" in entry.options and issubclass(_class(plugins.rules, entry.rule), FromOutput):
            yield from _no_blocks(("feedback", index, "at"), entry.options["at"], model)
    for index, hook in enumerate(recipe.hooks):
        for pattern in [hook.match] if isinstance(hook.match, str) else hook.match or []:
            yield from _unmatched(("hooks", index, "match"), pattern, sites)
        if recipe.data.limit is not None:
            yield from _too_late(("hooks", index), hook, -(-recipe.data.limit // recipe.data.batch_size) * recipe.train.epochs)


def _model(recipe: Recipe) -> nn.Module:
    """The model with its layers' names, which do not depend on the images; on the meta device where it can be built there."""
    name, options = recipe.model.name, recipe.model.options
    with _few_modules():
        try:
            with torch.device("meta"):
                return models.build(name, **options)
        except InputError:
            with torch.random.fork_rng(devices=[]):
                return models.build(name, **options)


MOST_MODULES = 100_000
"""More than any model has that a machine could train."""


@contextmanager
def _few_modules() -> Iterator[None]:
    """Refuse a model without end, as a depth of a hundred million is: it takes all memory, also where its weights take none."""
    left = MOST_MODULES

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(f"the model has more than {MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _unmatched(key: Key, pattern: str, sites: Sequence[Site]) -> Iterator[tuple[Key, str]]:
    try:
        selector_test(pattern, sites, "match")
    except InputError as error:
        yield key, str(error).removeprefix("match: ")


def _too_late(key: Key, hook: Hook, most_steps: int) -> Iterator[tuple[Key, str]]:
    """A hook that does nothing even in a training of `most_steps`, which is more than there are: some images validate."""
    try:
        check_begins(plugins.hooks.get(hook.name).build(**hook.options), most_steps)
    except InputError as error:
        yield key, str(error)


def _no_blocks(key: Key, at: str | Sequence[str] | None, model: nn.Module) -> Iterator[tuple[Key, str]]:
    try:
        find_blocks(model, [at] if isinstance(at, str) else at or [])
    except InputError as error:
        yield key, str(error).removeprefix("at: ")


def _class(registry: plugins.Registry, name: str) -> Any:
    return registry.get(name).target
