"""`fahooks ls`: tables of everything that has a name, generated from the registries."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fahooks import plugins
from fahooks.plugins import Entry, InputError, Registry, near

if TYPE_CHECKING:
    from fahooks.recipe import Shipped

REGISTRIES: dict[str, Registry] = {
    f"{registry.kind}s": registry
    for registry in (
        plugins.rules,
        plugins.hooks,
        plugins.models,
        plugins.datasets,
        plugins.augmentations,
        plugins.loaders,
        plugins.adapters,
    )
}
KINDS = [*REGISTRIES, "recipes"]
ZOOS = ("timm", "torchvision")


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(incomplete)]


@click.command(epilog="Example: fahooks ls rules 'usf*'")
@click.argument("kind", metavar=f"[{'|'.join(KINDS)}]", shell_complete=_complete)
@click.argument("pattern", required=False)
def ls(kind: str, pattern: str | None) -> None:
    """List what has a name, with its options and their defaults.

    PATTERN keeps the names that match it, such as 'usf*'. For models it searches timm and torchvision too:
    fahooks ls models 'timm/resnet*'
    """
    if kind not in KINDS:
        raise InputError(f"nothing is listed under {kind!r}{near(kind, KINDS)}; there are {', '.join(KINDS)}")
    if kind == "recipes":
        from fahooks.recipe import list_recipes

        recipes = {recipe.name: recipe for recipe in list_recipes()}
        _print(_recipe_table([recipes[name] for name in _matching(kind, recipes, pattern)]))
    elif kind == "models" and pattern is not None:
        _print_models(pattern)
    else:
        entries = {entry.name: entry for entry in REGISTRIES[kind]}
        if not entries:
            click.echo(f"no {REGISTRIES[kind].kind} is registered")
            return
        _print(_entry_table([entries[name] for name in _matching(kind, entries, pattern)]))
        if kind == "models":
            click.echo(
                "A model may also be timm/NAME, torchvision/NAME or path/to/file.py:factory; "
                "`fahooks ls models 'timm/resnet*'` lists names."
            )


def _matching(kind: str, names: Iterable[str], pattern: str | None) -> list[str]:
    """The sorted `names` that match the glob `pattern`; all of them without one."""
    names = sorted(names)
    if pattern is None:
        return names
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise InputError(f"none of the {kind} matches {pattern!r}{near(pattern.strip('*'), names)}")
    return found


def _print_models(pattern: str) -> None:
    """One model name a line: registered ones and those of the model libraries that `pattern` can mean."""
    library = pattern.partition("/")[0] if "/" in pattern else "*"
    names = [*plugins.models.names(), *(name for zoo in ZOOS if fnmatch.fnmatchcase(zoo, library) for name in _zoo(zoo))]
    for name in _matching("models", names, pattern):
        click.echo(name)


def _zoo(library: str) -> list[str]:
    if library == "timm":
        import timm

        return [f"timm/{name}" for name in timm.list_models()]
    import torchvision

    return [f"torchvision/{name}" for name in torchvision.models.list_models()]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    # As Text, since rich reads "[N, C]" in a str as markup and drops it.
    table.add_row(*map(Text, cells))


def _entry_table(entries: Iterable[Entry]) -> Table:
    table = _table("name", "summary", "options", "paper")
    for entry in entries:
        _add_row(table, entry.name, entry.summary, _options(entry.options), entry.paper)
    return table


def _options(options: Mapping[str, Any]) -> str:
    """Options as a user reads them: `scale=1.0`; a required one has no default."""
    return ", ".join(name if default is inspect.Parameter.empty else f"{name}={default}" for name, default in options.items())


def _recipe_table(recipes: Iterable[Shipped]) -> Table:
    table = _table("name", "summary", "paper")
    for recipe in recipes:
        _add_row(table, recipe.name, recipe.summary, recipe.paper)
    return table


def _print(table: Table) -> None:
    """Print to the terminal's width; into a file or a pipe, whole lines, so that nothing is cut or wrapped."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum)
    console.print(table)
