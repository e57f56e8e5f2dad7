"""Tables: on a terminal as wide as it is; into a file or a pipe plain, for grep and cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fahooks.terminal import on_terminal

PLAIN_WIDTH = 120


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table that folds to the terminal's width; otherwise a line for each row, with a tab between its cells."""
    if not on_terminal():
        for row in (columns, *rows):
            click.echo("\t".join(row).rstrip("\t"))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text, since rich reads "[N, C]" in a str as markup and drops it.
        table.add_row(*map(Text, row))
    Console().print(table)


def print_result(result: RenderableType) -> None:
    """A table of results, to be read: at the terminal's width; otherwise 120 columns wide, and without blanks at line ends."""
    if on_terminal():
        Console().print(result)
        return
    console = Console(width=PLAIN_WIDTH)
    with console.capture() as printed:
        console.print(result)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())
