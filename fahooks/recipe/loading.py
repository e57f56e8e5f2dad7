"""Loading: a recipe by name or file, whole and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fahooks.plugins import InputError, near
from fahooks.recipe.checking import add_schema_problems, check_folder, check_names, check_warmup
from fahooks.recipe.reading import Reader, Source, add_file, add_override, all_names, find_beside, read_file
from fahooks.recipe.schema import Paper, Recipe
from fahooks.recipe.tree import Tree, shown

MAX_PROBLEMS = 100


class RecipeError(InputError):
    """A recipe is wrong: the message has one line for each problem, of hundreds the first ones.

    Arguments:
        problems: the lines.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        more = len(problems) - MAX_PROBLEMS
        self.problems = [*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Shipped:
    """A row of `fahooks ls recipes`."""

    name: str
    summary: str
    paper: str


def find(name: str) -> Source:
    """The recipe that `name` stands for: a file, or a shipped recipe such as mnist/fa.

    Raises:
        InputError: neither, or the file can not be read.
    """
    return find_beside(name, beside=None)


def load(source: Source | str, overrides: Sequence[str] = (), swept: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its bases and `overrides`, and check all of it.

    Arguments:
        source: what `find` returned, or a name for it.
        overrides: "dotted.key=value" each, the value in YAML; later ones win.
        swept: the same, and problems with them are those of --sweep.

    Raises:
        RecipeError: every problem in it, one a line.
        InputError: the recipe does not exist.
    """
    return load_marked(find(source) if isinstance(source, str) else source, overrides, swept)[0]


def load_marked(
    source: Source, overrides: Sequence[str] = (), swept: Sequence[str] = (), *, here: bool = False
) -> tuple[Recipe, Tree]:
    """As `load`; with what was written of it, and where.

    Arguments:
        source: what `find` returned.
        overrides: as `load` takes them.
        swept: as `load` takes them.
        here: whether it is trained on this machine, and the folder of its data has to be there.

    Raises:
        RecipeError: every problem in it, one a line.
    """
    tree = Tree()
    add_file(tree, source, ())
    if not tree.whole:
        raise RecipeError(tree.problems)
    for override in overrides:
        add_override(tree, override)
    for override in swept:
        add_override(tree, override, "--sweep")
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(tree.data)
    except ValidationError as error:
        add_schema_problems(tree, error, Recipe, ())
    check_names(tree)
    check_warmup(tree)
    if here:
        check_folder(tree)
    if tree.problems or recipe is None:
        raise RecipeError(list(dict.fromkeys(tree.problems)))
    return recipe, tree


def read_plain(path: Path) -> dict[str, Any]:
    """What a recipe file says, as plain data: not checked, without its bases.

    Raises:
        InputError: it can not be read, is no mapping, or is larger than any recipe.
    """
    source, tree = read_file(path), Tree()
    data = Reader(tree, source.label).read(source.text)
    if tree.problems:
        raise RecipeError(tree.problems)
    if not isinstance(data, dict):
        raise InputError(f"recipe {source.label!r} can not be read: it is no mapping of keys to values")
    return data


def copy(name: str, to: Path) -> None:
    """Write the shipped recipe `name` to a new file, to be edited.

    Raises:
        InputError: no recipe of that name ships, or the file is there already or can not be made.
    """
    shipped = name.removesuffix(".yaml")
    if shipped not in shipped_names():
        raise InputError(
            f"no shipped recipe is named {shown(name)}{near(shipped, shipped_names())}; `fahooks ls recipes` lists all"
        )
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(resources.files("fahooks.recipes").joinpath(*f"{shipped}.yaml".split("/")).read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise InputError(f"{str(to)!r} is there already: name a new file") from error
    except OSError as error:
        raise InputError(f"{str(to)!r} can not be written: {error.strerror}") from error


def list_recipes() -> list[Shipped]:
    """The shipped recipes, sorted by name."""
    return [_describe(name) for name in shipped_names()]


def shipped_names() -> list[str]:
    """The names that `find` knows without a file, sorted; bases, whose folder begins with an underscore, are left out."""
    return sorted(name for name in all_names(resources.files("fahooks.recipes"), "") if not name.startswith("_"))


def _describe(name: str) -> Shipped:
    recipe = load(name)
    return Shipped(name, recipe.summary, _cell(recipe.paper) if recipe.paper else "")


def _cell(paper: Paper) -> str:
    error = "not in the paper" if paper.error is None else f"{paper.error} %"
    return f"Table {paper.table}, {paper.row}: {error}"
