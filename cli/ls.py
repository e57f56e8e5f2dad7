"""`fahooks ls`: tables of everything that has a name, generated from the registries."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import click

from fahooks import plugins
from fahooks.plugins import InputError, Registry, near

from .stopping import importing
from .tables import print_rows

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
COLUMNS = ("name", "summary", "options", "paper")
ZOOS = ("timm", "torchvision")


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(incomplete)]


@click.command(epilog="Example: fahooks ls rules 'usf*'")
@click.argument("kind", metavar=f"[{'|'.join(KINDS)}]", shell_complete=_complete)
@click.argument("pattern", required=False)
@importing()
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
        matching = [recipes[name] for name in _matching(kind, recipes, pattern)]
        print_rows(("name", "summary", "paper"), [(recipe.name, recipe.summary, recipe.paper) for recipe in matching])
    elif kind == "models" and pattern is not None:
        _print_models(pattern)
    else:
        entries = {entry.name: entry for entry in REGISTRIES[kind]}
        if kind == "datasets":
            from fahooks.recipe import own_options

            entries = {name: own_options(entry) for name, entry in entries.items()}
        if not entries:
            click.echo(f"no {REGISTRIES[kind].kind} is registered")
            return
        print_rows(COLUMNS, [_row(entries[name]) for name in _matching(kind, entries, pattern)])
        if kind == "models":
            click.echo(
                "A model may also be timm/NAME, torchvision/NAME or path/to/file.py:factory; "
                "`fahooks ls models 'timm/resnet*'` lists names.",
                err=True,
            )


def _row(entry: plugins.Entry) -> tuple[str, str, str, str]:
    return entry.name, entry.summary, _options(entry.options), entry.paper


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
    """The registered models, with their options, and the names of those of the model libraries that `pattern` can mean."""
    library = pattern.partition("/")[0] if "/" in pattern else "*"
    names = [*plugins.models.names(), *(name for zoo in ZOOS if fnmatch.fnmatchcase(zoo, library) for name in _zoo(zoo))]
    found = _matching("models", names, pattern)
    if any(name in plugins.models for name in found):
        print_rows(COLUMNS, [_row(plugins.models.get(name)) if name in plugins.models else (name, "", "", "") for name in found])
    else:
        click.echo("\n".join(found))


def _zoo(library: str) -> list[str]:
    if library == "timm":
        import timm

        return [f"timm/{name}" for name in timm.list_models()]
    import torchvision

    return [f"torchvision/{name}" for name in torchvision.models.list_models()]


def _options(options: Mapping[str, Any]) -> str:
    """Options as a user reads them: `scale=1.0`; a required one has no default."""
    return ", ".join(name if default is inspect.Parameter.empty else f"{name}={default}" for name, default in options.items())
