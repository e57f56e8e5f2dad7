"""`fahooks show`: a recipe as it would run, and where each value comes from."""

from __future__ import annotations

import click
from rich.console import Console
from rich.text import Text

from fahooks.terminal import on_terminal

from .arguments import RECIPE, SETTINGS
from .stopping import importing


@click.command(epilog="Example: fahooks show mnist/fa-usf-sn --set train.epochs=1")
@RECIPE
@SETTINGS
@importing()
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print RECIPE with its bases, every default and where each value comes from.

    Nothing is run. What is printed is YAML, with the origin of each value as a comment: its file and line, a base, --set, or the
    default. Only what a model takes from its images, such as the number of classes, is left to the run.
    """
    from fahooks.recipe import explain, find

    lines = explain(find(recipe), overrides)
    console = Console(soft_wrap=True, force_terminal=on_terminal())
    column = max(len(line.text) for line in lines if len(line.text) < 60) + 2 if on_terminal() else 0
    for line in lines:
        origin = f"{'':{max(2, column - len(line.text))}}# {line.origin}" if line.origin else ""
        console.print(Text(line.text).append(origin, style="dim"))
