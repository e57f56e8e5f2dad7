"""`fahooks validate`: recipes checked, nothing run."""

from __future__ import annotations

import click

from fahooks.plugins import InputError

from .arguments import RecipeName
from .stopping import importing


@click.command(epilog="Example: fahooks validate mnist/fa my-recipe.yaml")
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=RecipeName().shell_complete)
@importing()
def validate(recipes: tuple[str, ...]) -> None:
    """Check recipes, all shipped ones where none is named, and say what is wrong in each.

    RECIPE is the name of a shipped recipe (`fahooks ls recipes`) or a file. Patterns are tried on the model's layers; no data
    is read. One line for each that is right, and for each problem; exit code 2 if there is one.
    """
    from fahooks.recipe import printable, shipped_names

    names = recipes or shipped_names()
    wrong = 0
    for name in names:
        problems = _problems(name)
        click.echo("\n".join(problems) or f"{printable(name)}: ok")
        wrong += bool(problems)
    if wrong:
        raise InputError("the recipe is wrong" if len(names) == 1 else f"of {len(names)} recipes, {wrong} wrong")


def _problems(name: str) -> list[str]:
    from fahooks.recipe import RecipeError, find

    try:
        source = find(name)
        from fahooks.training.fitting import load_fitting  # needs torch

        load_fitting(source, here=False)
    except RecipeError as error:
        return error.problems
    except InputError as error:
        return [str(error)]
    return []
