"""Where every value of a recipe comes from: its file and line, a base, `--set`, or a default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fahooks import plugins
from fahooks.recipe.checking import left_out, with_defaults
from fahooks.recipe.loading import load_marked
from fahooks.recipe.reading import Source
from fahooks.recipe.schema import Recipe
from fahooks.recipe.tree import ABSENT, Key, Tree, child_of


@dataclass(frozen=True)
class Line:
    """A line of YAML, and where what it says was written.

    Attributes:
        text: the line; all lines together are the recipe.
        origin: such as "my.yaml:3", "base fahooks/recipes/mnist/fa.yaml:2", "--set", "default"; empty where a section opens.
    """

    text: str
    origin: str


def explain(source: Source, overrides: Sequence[str] = ()) -> list[Line]:
    """The recipe with its defaults, a line a value, each with its origin.

    What a model takes from the images that it is trained on, such as the number of classes, is left out where the recipe does not
    say it: that is known once they are read.

    Arguments:
        source: what `find` returned.
        overrides: "dotted.key=value" each.

    Raises:
        RecipeError: every problem in it, one a line.
    """
    recipe, tree = load_marked(source, overrides)
    written = _plain(_completed(recipe))
    return [Line(text, "" if key is None else _origin(tree, key, source)) for text, key in _lines(written, (), "")]


def _completed(recipe: Recipe) -> Recipe:
    """The recipe with the options of all that it names written out."""
    augment = [
        {name: {**options, **left_out(options, plugins.augmentations.get(name))} for name, options in step.items()}
        for step in recipe.data.augment
    ]
    model = recipe.model
    if model.name in plugins.models:
        from fahooks import models

        fitted = models.options_for_images(model.name, (0, 0, 0), 0).keys() - model.options.keys()
        complete = with_defaults(model, plugins.models.get(model.name))
        model = type(model).model_validate({k: v for k, v in complete.model_dump().items() if k not in fitted})
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"augment": augment}),
            "model": model,
            "feedback": [with_defaults(entry, plugins.rules.get(entry.rule)) for entry in recipe.feedback],
            "hooks": [with_defaults(entry, plugins.hooks.get(entry.name)) for entry in recipe.hooks],
        }
    )


def _plain(recipe: Recipe) -> dict[str, Any]:
    return yaml.safe_load(recipe.as_yaml())


def _lines(value: dict[str, Any] | list[Any], at: Key, indent: str) -> Iterator[tuple[str, Key | None]]:
    """The lines of a section, each with the key that it says; None for one that only opens a section."""
    for part, child in value.items() if isinstance(value, dict) else enumerate(value):
        key = (*at, part)
        head = f"{part}:" if isinstance(value, dict) else "-"
        if isinstance(child, dict) and child or (isinstance(child, list) and any(isinstance(c, dict | list) for c in child)):
            below = list(_lines(child, key, f"{indent}  "))
            if isinstance(value, dict):
                yield f"{indent}{head}", None
            else:
                below[0] = (f"{indent}- {below[0][0].strip()}", below[0][1])
            yield from below
        else:
            said = yaml.safe_dump(child, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
            yield f"{indent}{head} {said}", key


def _origin(tree: Tree, key: Key, source: Source) -> str:
    value: Any = tree.data
    for part in key:
        value = child_of(value, part)
    if value is ABSENT:
        return "default"
    mark = tree.mark(key)
    return mark if mark == "--set" or mark.startswith(f"{source.label}:") else f"base {mark}"
