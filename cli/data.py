"""`fahooks data`: files for the ffcv loader, and how fast loaders are."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from .arguments import NUMBERS, RECIPE, SETTINGS, names
from .stopping import importing, stoppable

if TYPE_CHECKING:
    from fahooks.data.throughput import Throughput


@click.group()
def data() -> None:
    """Write what the loader of a recipe reads, and compare how fast loaders are."""


@data.command()
@RECIPE
@SETTINGS
def prepare(recipe: str, overrides: tuple[str, ...]) -> None:
    """Write the .beton files that the ffcv loader reads for RECIPE, unless they are there, and print where they are.

    How images are packed is said by data.loader=ffcv and data.loader_options: mode (raw, jpg, proportion), quality, proportion,
    max_side, shorter_side, folder, workers. `fahooks ls loaders` has them all.
    """
    with importing():
        from fahooks.training.feeding import prepare_data

    with stoppable("stopped; the files that are whole stay, and the same command writes the others"):
        files = prepare_data(recipe, overrides)
    for file in files:
        click.echo(file)


@data.command()
@RECIPE
@click.option("--loaders", metavar="NAMES", help="Such as memory,ffcv.  [default: all that work here]")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Turns that each loader gets.")
@click.option("--seconds", default=2.0, show_default=True, type=click.FloatRange(0), help="How long a turn is at least.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of torch.  [default: its own choice]")
@SETTINGS
@NUMBERS
def bench(
    recipe: str,
    loaders: str | None,
    rounds: int,
    seconds: float,
    threads: int | None,
    overrides: tuple[str, ...],
    file: Path | None,
) -> None:
    """Time how fast each loader feeds the training images of RECIPE, augmented and normalised, in turns.

    Rows are medians over rounds, with the slowest and the fastest. A CPU second is one of any thread of the process; "opening" is
    the time to the first batch, decoding all images into memory included, writing .beton files not.
    """
    with importing():
        from fahooks.training.device import set_threads
        from fahooks.training.feeding import compare_loaders

    if threads:
        set_threads(threads, "--threads")
    with stoppable("stopped; nothing was measured"):
        measured, left_out = compare_loaders(recipe, overrides, only=names("--loaders", loaders), rounds=rounds, seconds=seconds)
    for name, reason in left_out.items():
        click.echo(f"fahooks: {name} is left out: {reason}", err=True)
    click.echo(_table(measured))
    if file:
        file.write_text(json.dumps([found.as_dict() for found in measured], indent=1) + "\n")


def _table(measured: list[Throughput]) -> str:
    header = ("loader", "images/s", "slowest-fastest", "images/CPU-s", "slowest-fastest", "opening")
    rows: list[tuple[str, ...]] = [header]
    for found in measured:
        both = (found.per_second, found.per_cpu_second)
        speeds = (text for values in both for text in (f"{median(values):,.0f}", f"{min(values):,.0f}-{max(values):,.0f}"))
        rows.append((found.loader, *speeds, f"{found.opening:.1f} s"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
