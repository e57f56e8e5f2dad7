"""What several commands take: RECIPE, --set, --json FILE, and lists of names and seeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import click
from click.shell_completion import CompletionItem

from fahooks.plugins import InputError

Item = TypeVar("Item", str, int)


class RecipeName(click.ParamType):
    """A shipped recipe or a file, sought as soon as it is read: before torch is imported, which takes seconds."""

    name = "recipe"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value`.

        Raises:
            InputError: there is no such recipe. Processes that torchrun started leave that to the command, which lets one speak.
        """
        from fahooks.recipe import find
        from fahooks.training.torchrun import started_by_torchrun

        if not started_by_torchrun():
            find(value)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer shipped recipes and files."""
        # In this order: bash forgets what stands before an item that asks for files.
        return [CompletionItem(incomplete, type="file"), *complete_shipped(ctx, param, incomplete)]


class FileToWrite(click.Path):
    """A file that is written in the end; whether that can be done is found out before the minutes that come first."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; nothing is left there that was not there before.

        Raises:
            InputError: it can not be written.
        """
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        target = path.resolve()
        if (ctx is not None and ctx.resilient_parsing) or (target.exists() and not target.is_file()):
            return path  # a shell completes the line; or a device or a pipe, which may be opened once only
        there = target.exists()
        try:
            target.open("a").close()
        except OSError as error:
            raise InputError(f"{str(path)!r} can not be written: {error.strerror}") from error
        if not there:
            target.unlink()
        return path


def complete_shipped(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the shipped recipes."""
    from fahooks.recipe import shipped_names

    return [CompletionItem(name) for name in shipped_names() if name.startswith(incomplete)]


RECIPE = click.argument("recipe", type=RecipeName())

NUMBERS = click.option("--json", "file", type=FileToWrite(), help="Write the numbers here too.")

SETTINGS = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, such as train.epochs=1; repeatable.",
)


def names(option: str, text: str | None) -> list[str]:
    """The names in `text`, which `option` was given; none where it was not.

    Raises:
        InputError: one of them is empty, or given twice.
    """
    if text is None:
        return []
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise InputError(f"{option} must be names with a comma between them (got {text!r})")
    return _each_once(option, found)


def numbers(text: str) -> list[int]:
    """The seeds in `text`.

    Raises:
        InputError: `text` is no list of them, or has one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 20 and int(part) < 2**63 for part in parts):
        raise InputError(f"--seeds must be whole numbers from 0 on, such as 0,1,2 (got {text!r})")
    return _each_once("--seeds", list(map(int, parts)))


def _each_once(option: str, given: list[Item]) -> list[Item]:
    for place, item in enumerate(given):
        if item in given[:place]:
            raise InputError(f"{option} has {item} twice: give it once")
    return given
