"""`fahooks validate`: recipes checked, nothing run."""

from __future__ import annotations

import click

from fahooks.plugins import InputError


@click.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
def validate(recipes: tuple[str, ...]) -> None:
    """Check recipes, all shipped ones where none is named, and say what is wrong in each.

    RECIPE is the name of a shipped recipe (`fahooks ls recipes`) or a file. One line each; exit code 2 if one is wrong.
    """
    from fahooks.recipe import printable, shipped_names

    names = recipes or shipped_names()
    wrong = 0
    for name in names:
        problems = _problems(name)
        click.echo(f"{printable(name)}: {'; '.join(problems) or 'ok'}")
        wrong += bool(problems)
    if wrong:
        raise InputError(f"{wrong} of {len(names)} recipes {'is' if wrong == 1 else 'are'} wrong")


def _problems(name: str) -> list[str]:
    from fahooks.recipe import RecipeError, load

    try:
        load(name)
    except RecipeError as error:
        return error.problems
    except InputError as error:
        return [str(error)]
    return []
