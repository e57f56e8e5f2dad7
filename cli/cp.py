"""`fahooks cp`: a shipped recipe, to be edited."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import complete_shipped


@click.command(epilog="Example: fahooks cp mnist/fa-usf-sn my-recipe.yaml")
@click.argument("recipe", shell_complete=complete_shipped)
@click.argument("file", type=click.Path(path_type=Path))
def cp(recipe: str, file: Path) -> None:
    """Copy the shipped RECIPE (`fahooks ls recipes`) to the new FILE, to edit it.

    A file that is there already is never written over.
    """
    from fahooks.recipe import copy

    copy(recipe, file)
    click.echo(f"{file}: a copy of {recipe}; edit it, then `fahooks train {file}`")
