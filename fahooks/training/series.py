"""A series of runs that is trained as one: what is finished stays, what was interrupted goes on, what is missing begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fahooks.data import Dataset
from fahooks.plugins import InputError
from fahooks.recipe import Recipe, RecipeError, Source, load
from fahooks.training import distributed
from fahooks.training.commands import final_line, run_at
from fahooks.training.distributed import told
from fahooks.training.failures import recorded
from fahooks.training.loop import Diverged, train
from fahooks.training.resolution import resolve
from fahooks.training.run_directory import BARELY_BEGUN, RunDirectory, held
from fahooks.training.sameness import FREE, check_same
from fahooks.training.setup import Setup, prepare
from fahooks.training.stopping import Stop
from fahooks.training.streams import SharedStreams, data_key


@dataclass(frozen=True)
class Wanted:
    """A run of a series.

    Attributes:
        path: where it belongs; those that differ in their seed alone lie beside each other, as seed-0, seed-1 ...
        recipe: what it trains.
        source: the recipe as it was given.
        overrides: what was changed of it.
        setting: what tells it from other runs of the recipe, but for its seed; empty where nothing does.
    """

    path: Path
    recipe: Recipe
    source: Source
    overrides: tuple[str, ...]
    setting: str = ""

    @property
    def name(self) -> str:
        """What lines about it call it."""
        return ", ".join([self.recipe.name, *([self.setting] if self.setting else []), f"seed {self.recipe.seed}"])

    @property
    def run(self) -> RunDirectory:
        """Its directory, whether it is there or not."""
        return RunDirectory(self.path)

    @property
    def finished(self) -> bool:
        """Whether it needs no training any more."""
        return self.run.finished

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with."""
        return self.run.begun


def carry_out(wanted: Sequence[Wanted], out: Path, advice: Callable[[Sequence[Wanted]], str] | None = None) -> list[str]:
    """Train what is missing of a series, and print a line about each run.

    A finished run is taken as it is, one that was interrupted goes on. Whatever can be wrong before the first step of any run is
    found before anything is written. Several processes may work on one series: each run is trained by one of them.

    Arguments:
        wanted: the runs.
        out: the folder that they all lie in.
        advice: what else to do where the data of some runs are not at hand.

    Returns:
        A line for each run whose loss diverged; the others were trained all the same.

    Raises:
        InputError: data are not right, `out` can not be written, or what is in it was made from other recipes.
    """
    console = Console(quiet=distributed.rank() != 0)
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {str(out)!r} can not be written, since {str(there)!r} can not: name another folder")
    with closing(SharedStreams()) as streams:
        _check_data(wanted, streams, advice)
        finished = told(lambda: [run.finished for run in wanted])
        missing = [run for run, done in zip(wanted, finished, strict=True) if not done]
        _print(console, f"{out}: {_counted(wanted)}, {len(wanted) - len(missing)} of them finished, {len(missing)} to train")
        # Backwards, so that the images that are checked last are those that are trained on first.
        for cell in {run.path.parent: run for run in reversed(missing)}.values():
            recipe = cell.run.as_begun(cell.recipe)
            prepare(recipe, streams.open(recipe))
        lines = [_train(run, streams, console, f"{number} of {len(missing)}") for number, run in enumerate(missing, start=1)]
    return [line for line in lines if line]


@contextmanager
def goes_on_by_itself() -> Iterator[None]:
    """Say of a stop in the block that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("stopped; the same command goes on from there") from stop


def _check_data(wanted: Sequence[Wanted], streams: SharedStreams, advice: Callable[[Sequence[Wanted]], str] | None) -> None:
    """Refuse data that are not at hand, and run directories that other recipes made, dataset by dataset."""
    by_data: dict[str, list[Wanted]] = {}
    for run in wanted:
        by_data.setdefault(data_key(run.recipe), []).append(run)
    problems: list[str] = []
    for runs in by_data.values():
        try:
            dataset = streams.dataset(runs[0].recipe)
        except InputError as error:
            problems.append(f"{error}; or {advice(runs)}" if advice else str(error))
        else:
            for run in runs:
                _check_directories(run, dataset)
    if problems:
        raise InputError("\n".join(problems))


def _check_directories(run: Wanted, dataset: Dataset) -> None:
    """Refuse what lies in the place of `run`, and in that of another seed of its cell, if another recipe made it.

    The seeds of a cell are averaged, so they must have everything else in common.
    """
    for path in sorted(run.path.parent.glob("seed-*")):
        if (path / "resolved.yaml").is_file():
            made_from = _made_from(path)
            seed = run.recipe.seed if path == run.path else made_from.seed
            there = RunDirectory(path)
            asked = resolve(there.as_begun(run.recipe.model_copy(update={"seed": seed})), dataset)
            # Written out again, for the options that rules and hooks did not have yet when it was made.
            before = resolve(made_from, dataset) if made_from.data.dataset == asked.data.dataset else made_from
            # What another loader fed is as good once it is there, but a run goes on with the one that it began with.
            free = (*FREE, "data.loader", "data.loader_options") if there.finished else FREE
            there_and_here = before.model_dump(mode="json"), asked.model_dump(mode="json")
            check_same(*there_and_here, f"the run in {str(path)!r} was made", "name another --out", free)
    left = {file.name for file in run.path.iterdir()} if run.path.is_dir() else set()
    if run.path.exists() and not run.begun and not (run.path.is_dir() and left <= BARELY_BEGUN):
        raise InputError(f"{str(run.path)!r} is in the way of a run, and is none: move it, or name another --out")


def _made_from(path: Path) -> Recipe:
    try:
        return load(str(path / "resolved.yaml"))
    except RecipeError as error:
        raise InputError(f"the run in {str(path)!r} can not go on: {'; '.join(error.problems)}; name another --out") from error


def _train(run: Wanted, streams: SharedStreams, console: Console, number: str) -> str:
    """Train a run, from its beginning or from where it was stopped; a line about it if its loss diverged."""
    name = run.name
    with _taken(run) as mine:
        if not mine:
            _print(console, f"{number}: {name}: another process has it")
            return ""
        resumed = told(lambda: run.begun)
        _print(console, f"{number}: {name}: {'goes on' if resumed else 'begins'}")
        recipe = run.run.as_begun(run.recipe)
        with recorded(run_at(run.path)) if resumed else nullcontext():
            setup = prepare(recipe, streams.open(recipe))
        directory = run_at(run.path if resumed else told(lambda: _created(run, setup).path))
        try:
            with Stop() as stop:
                result = train(setup, directory, resume=resumed, stop=stop)
        except Diverged as error:
            distributed.outlive()
            _print(console, f"{name}: {error}")
            return f"{name}: {error}"
        _print(console, final_line(setup.recipe, result, directory))
    if distributed.any_rank(stop.requested):  # when the run was as good as over
        raise KeyboardInterrupt
    return ""


@contextmanager
def _taken(run: Wanted) -> Iterator[bool]:
    """Hold the directory of a run during the block; False if others do, or have finished it. Rank 0 holds it for all."""
    if distributed.rank() != 0:
        yield told(lambda: False)
        return
    with held(run.run.lock) as mine:
        yield told(lambda: mine and not run.finished)


def _created(run: Wanted, setup: Setup) -> RunDirectory:
    return RunDirectory.create(setup.recipe, run.source, out=run.path, overrides=run.overrides, choices=setup.choices)


def _counted(runs: Sequence[Wanted]) -> str:
    return f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
