"""`python -m tests.zoo`: check the conversion of every model of timm and torchvision, and write a table of it.

A model is checked in a process of its own, so that one that fails, hangs or takes too much memory stops no other. What is done is
kept in a file, and the same command goes on with the rest.
"""

from __future__ import annotations

import fnmatch
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fahooks.plugins import near
from tests.zoo import table
from tests.zoo.exactness import Inexact, TooSmall
from tests.zoo.names import Unfit, all_names, check_by_name, family


def _shard(context: click.Context, option: click.Parameter, value: str) -> slice:
    first, _, step = value.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise click.BadParameter(f"I/N with 1 <= I <= N, not {value!r}")
    return slice(int(first) - 1, None, int(step))


ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
A_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.option("--all", "everything", is_flag=True, help="Every model.")
@click.option("--match", multiple=True, metavar="GLOB", help="Models such as 'timm/beit*'; repeatable.")
@click.option(
    "--shard", default="1/1", show_default=True, callback=_shard, metavar="I/N", help="Every N-th model, from the I-th on."
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes side by side, of one thread each."
)
@click.option("--memory", type=ABOVE_ZERO, default=10.0, show_default=True, help="GiB that one process may take.")
@click.option("--minutes", type=ABOVE_ZERO, default=15.0, show_default=True, help="How long one model may take.")
@click.option("--results", type=A_FILE, default=Path("docs/zoo.csv"), show_default=True)
@click.option("--again", is_flag=True, help="Check those anew that did not pass.")
@click.option("--table", "page", type=A_FILE, help="Write a page about all results.")
def main(
    everything: bool,
    match: tuple[str, ...],
    shard: slice,
    workers: int,
    memory: float,
    minutes: float,
    results: Path,
    again: bool,
    page: Path | None,
) -> None:
    """Check, then write the table."""
    known = all_names()
    for glob in match:
        if not fnmatch.filter(known, glob):
            raise click.UsageError(f"--match {glob!r} fits no model{near(glob, known)}")
    if everything and match or not (everything or match or page):
        raise click.UsageError("which models? --all, or --match GLOB")
    results.parent.mkdir(parents=True, exist_ok=True)
    done = table.read(results)
    finished = {name for name, row in done.items() if not again or row["result"] == "pass"}
    names = [name for name in known if everything or any(fnmatch.fnmatchcase(name, glob) for glob in match)]
    left = [name for name in names[shard] if name not in finished]
    click.echo(f"{len(left)} to check, {len(names[shard]) - len(left)} already in {results}")
    for row in _side_by_side(left, workers, memory * 2**30, 60 * minutes):
        table.append(results, row)
        click.echo(f"{row['name']:50} {row['result']:8} {row['seconds']:6.1f} s  {row['reason']}")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        table.write(page, results)


def _side_by_side(names: Sequence[str], workers: int, memory: float, seconds: float) -> Iterator[dict[str, Any]]:
    """Check every name in a process of its own, `workers` at a time, and yield what each found."""
    torch.set_num_threads(1)  # before the first fork: threads do not survive one
    waiting = list(reversed(names))
    running: dict[int, tuple[str, int, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop()
            there, here = os.pipe()
            if (process := os.fork()) == 0:
                os.close(there)
                _answer(name, here)
            os.close(here)
            running[process] = (name, there, time.monotonic())
        time.sleep(0.05)
        for process, (name, there, started) in list(running.items()):
            ended, _ = os.waitpid(process, os.WNOHANG)
            taken = time.monotonic() - started
            killed = ""
            if not ended and _resident(process) > memory:
                killed = f"it takes more than {memory / 2**30:g} GiB of memory"
            elif not ended and taken > seconds:
                killed = f"it takes more than {seconds / 60:g} minutes"
            if killed:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            if ended or killed:
                with os.fdopen(there, encoding="utf-8") as pipe:
                    answer = pipe.read()
                del running[process]
                lost = {"result": "skipped" if killed else "fail", "reason": killed or "the process died"}
                found = json.loads(answer) if answer and not killed else lost
                yield {"name": name, "family": family(name), "seconds": round(taken, 1), **found}


def _resident(process: int) -> int:
    """How many bytes of memory a process has."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1]
    except OSError:  # it ended just now
        return 0
    return int(pages) * resource.getpagesize()


def _answer(name: str, pipe: int) -> None:
    """In a child: check the model, write what was found, and end."""
    warnings.simplefilter("ignore")
    try:
        found: dict[str, Any] = _check(name)
    except BaseException as error:
        found: dict[str, Any] = {"result": "fail", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    with os.fdopen(pipe, "w", encoding="utf-8") as file:
        file.write(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def _check(name: str) -> dict[str, Any]:
    try:
        made, weights = check_by_name(name)
    except Unfit as error:
        return {"result": "skipped", "reason": str(error)}
    except (Inexact, TooSmall) as error:
        return {"result": "fail", "reason": str(error)[:1000]}
    parameters = sum(p.numel() for p in made.model.parameters())
    about = {"weights": weights, "side": made.side, "size": made.size, "parameters": parameters}
    return {"result": "pass", "reason": "", **about}


if __name__ == "__main__":
    main()
