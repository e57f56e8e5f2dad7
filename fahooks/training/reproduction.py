"""Reproducing the paper's Table 1: every cell is a shipped recipe, and whatever is missing of its runs is trained."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fahooks.data import Dataset
from fahooks.plugins import InputError, near
from fahooks.recipe import Recipe, RecipeError, find, load, shipped_names
from fahooks.recipe.comparison import differences
from fahooks.recipe.reading import add_file
from fahooks.recipe.tree import Tree
from fahooks.report import table1
from fahooks.training.commands import final_line
from fahooks.training.loop import Diverged, train
from fahooks.training.run_directory import BARELY_BEGUN, RunDirectory, held
from fahooks.training.setup import Setup, load_dataset, prepare, resolve

OUT = Path("runs/table1")


@dataclass(frozen=True)
class Entry:
    """A recipe of Table 1.

    Attributes:
        name: column and row as users type them: mnist/fa-usf-sn.
        row: as the paper spells it.
        column: as the paper's table spells it.
    """

    name: str
    row: str
    column: str

    @property
    def typed(self) -> tuple[str, str]:
        """Column and row as users type them."""
        column, _, row = self.name.rpartition("/")
        return column, row


@dataclass(frozen=True)
class Wanted:
    """A run of the table.

    Attributes:
        path: where it belongs.
        recipe: what it trains.
        overrides: what `--set` and `--seeds` changed of the shipped recipe.
    """

    path: Path
    recipe: Recipe
    overrides: tuple[str, ...]

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


def reproduce(
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    out: Path = OUT,
) -> list[str]:
    """Train what is missing of the chosen cells of Table 1, each in out/<recipe name>/seed-<n>.

    A finished run is taken as it is, one that was interrupted goes on. Whatever can be wrong before
    the first step, of any run, is found before anything is written. Several processes may work on one folder: each run is trained
    by one of them.

    Arguments:
        columns: folders of recipes, such as mnist, or the paper's names; all of them by default.
        rows: last parts of recipe names, such as bp-noise, or the paper's names; all of them by default.
        seeds: one run a cell for each.
        overrides: "dotted.key=value" each, for all runs.
        out: the folder for the run directories.

    Returns:
        A line for each run whose loss diverged; the others were trained all the same.

    Raises:
        InputError: names, overrides or data are not right, or what is in `out` was made from other recipes.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    console = Console()
    try:
        wanted = _plan(choose(columns, rows), seeds, overrides, out)
        missing = [run for run in wanted if not run.finished]
        _print(console, f"{out}: {len(wanted)} runs, {len(wanted) - len(missing)} of them finished, {len(missing)} to train")
        for recipe in {run.recipe.name: run.recipe for run in missing}.values():
            prepare(recipe)
        lines = [_train(run, console, f"{number} of {len(missing)}") for number, run in enumerate(missing, start=1)]
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("stopped; the same command goes on from there") from stop
    return [line for line in lines if line]


def choose(columns: Sequence[str], rows: Sequence[str]) -> list[Entry]:
    """The recipes of Table 1 that lie in `columns` and `rows`, all where one is empty, in the paper's order.

    Raises:
        InputError: a name that the table does not have, or nothing is left.
    """
    entries = _entries()
    in_columns = _meant("column", columns, {entry.typed[0]: entry.column for entry in entries})
    in_rows = _meant("row", rows, {entry.typed[1]: entry.row for entry in entries})
    chosen = [entry for entry in entries if entry.typed[0] in in_columns and entry.typed[1] in in_rows]
    if not chosen:
        raise InputError(f"Table 1 has no cell in --columns {','.join(columns)} and --rows {','.join(rows)}")
    return chosen


def write_table(out: Path = OUT) -> list[table1.Cell]:
    """Write table1.csv and table1.md of all that is finished in `out`, where something is, and return their cells.

    Raises:
        InputError: a run directory is damaged.
    """
    # Held from the reading on, so that of several processes the last one to write has read all that the others finished.
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".table1.lock", wait=True):
        cells = table1.read(out)
        if cells:
            table1.write(out, cells, command(cells, out))
    return cells


def command(cells: Sequence[table1.Cell], out: Path = OUT) -> str:
    """What to type to make `cells`, which lie in `out`, anew: one command for those that have seeds and overrides in common."""
    entries = _entries()
    rows: dict[tuple[str, tuple[int, ...], tuple[str, ...]], list[str]] = {}
    for cell in cells:
        column, _, row = cell.recipe.rpartition("/")
        rows.setdefault((column, cell.seeds, cell.overrides), []).append(row)
    columns: dict[tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]], list[str]] = {}
    for (column, seeds, overrides), made in rows.items():
        whole = {entry.typed[1] for entry in entries if entry.typed[0] == column} == set(made)
        columns.setdefault((() if whole else tuple(made), seeds, overrides), []).append(column)
    return " && ".join(_command(named, *options, out) for options, named in columns.items())


def _command(columns: Sequence[str], rows: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], out: Path) -> str:
    words = ["fahooks", "reproduce", "table1", "--columns", ",".join(columns)]
    words += ["--rows", ",".join(rows)] if rows else []
    words += ["--seeds", ",".join(map(str, seeds))] if tuple(seeds) != (0,) else []
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--out", str(out)] if out != OUT else []
    return shlex.join(words)


def _entries() -> list[Entry]:
    """The shipped recipes of Table 1, in the paper's order. Only their place in it is read: most of them will not run."""
    entries: list[Entry] = []
    for name in shipped_names():
        tree = Tree()
        add_file(tree, find(name), ())
        if tree.get(("paper", "table")) == 1:
            entries.append(Entry(name, str(tree.get(("paper", "row"))), str(tree.get(("paper", "column")))))
    return sorted(entries, key=lambda entry: table1.order(entry.row, entry.column))


def _meant(kind: str, asked: Sequence[str], known: Mapping[str, str]) -> set[str]:
    """The keys of `known` that `asked` names, by key or by value; all of them where nothing is asked."""
    keys = {spelling.casefold(): key for key, value in known.items() for spelling in (value, key)}
    for name in asked:
        if name.casefold() not in keys:
            close = near(name, dict.fromkeys([*known, *known.values()]))
            raise InputError(f"Table 1 has no {kind} {name!r}{close}; there are {', '.join(known)}")
    return {keys[name.casefold()] for name in asked} if asked else set(known)


def _plan(entries: Sequence[Entry], seeds: Sequence[int], overrides: Sequence[str], out: Path) -> list[Wanted]:
    """Every run, column by column and there seed by seed, so that a whole column of one seed is there first."""
    for override in overrides:
        if override.partition("=")[0].split(".")[0] in ("name", "paper", "seed"):
            raise InputError(f"reproduce takes name and paper from its recipes and seeds from --seeds (got --set {override})")
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {str(out)!r} can not be written, since {str(there)!r} can not: name another folder")
    columns = dict.fromkeys(entry.typed[0] for entry in entries)
    wanted = [
        _wanted(entry.name, seed, overrides, out)
        for column in columns
        for seed in seeds
        for entry in entries
        if entry.typed[0] == column
    ]
    _check_data(wanted)
    return wanted


def _wanted(name: str, seed: int, overrides: Sequence[str], out: Path) -> Wanted:
    changed = (*overrides, f"seed={seed}")
    return Wanted(out / name / f"seed-{seed}", load(name, changed), changed)


def _check_data(wanted: Sequence[Wanted]) -> None:
    """Refuse data that are not at hand, and run directories that other recipes made, dataset by dataset."""
    by_data: dict[str, list[Wanted]] = {}
    for run in wanted:
        wanted_data = run.recipe.data
        key = (wanted_data.dataset, wanted_data.dataset_options, wanted_data.root, wanted_data.download)
        by_data.setdefault(repr(key), []).append(run)
    problems: list[str] = []
    for runs in by_data.values():
        try:
            dataset = load_dataset(runs[0].recipe)
        except InputError as error:
            columns = ", ".join(dict.fromkeys(run.recipe.name.rpartition("/")[0] for run in runs))
            problems.append(f"{error}; or choose other --columns than {columns}")
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
            asked = resolve(run.recipe.model_copy(update={"seed": seed}), dataset)
            # Written out again, for the options that rules and hooks did not have yet when it was made.
            same_data = made_from.data.dataset == asked.data.dataset
            _check_same(path, resolve(made_from, dataset) if same_data else made_from, asked)
    left = {file.name for file in run.path.iterdir()} if run.path.is_dir() else set()
    if run.path.exists() and not run.begun and not (run.path.is_dir() and left <= BARELY_BEGUN):
        raise InputError(f"{str(run.path)!r} is in the way of a run, and is none: move it, or name another --out")


def _made_from(path: Path) -> Recipe:
    try:
        return load(str(path / "resolved.yaml"))
    except RecipeError as error:
        raise InputError(f"the run in {str(path)!r} can not go on: {'; '.join(error.problems)}; name another --out") from error


def _check_same(path: Path, made_from: Recipe, asked: Recipe) -> None:
    found = differences(
        made_from.model_dump(mode="json"),
        asked.model_dump(mode="json"),
        apart_from=("checkpoint", "data.root", "data.loader", "data.loader_options"),
    )
    if found:
        said = ", ".join(f"{key} ({there} there, {here} asked)" for key, (there, here) in found.items())
        raise InputError(f"{str(path)!r} holds a run of another recipe: {said}; name another --out")


def _train(run: Wanted, console: Console, number: str) -> str:
    """Train a run, from its beginning or from where it was stopped; a line about it if its loss diverged."""
    name = f"{run.recipe.name}, seed {run.recipe.seed}"
    run.path.mkdir(parents=True, exist_ok=True)
    with held(run.run.lock) as mine:
        if not mine or run.finished:
            _print(console, f"{number}: {name}: another process has it")
            return ""
        _print(console, f"{number}: {name}: {'goes on' if run.begun else 'begins'}")
        setup = prepare(run.recipe)
        resumed = run.begun
        directory = run.run if resumed else _created(run, setup)
        try:
            result = train(setup, directory, resume=resumed)
        except Diverged as error:
            _print(console, f"{name}: {error}")
            return f"{name}: {error}"
        _print(console, final_line(setup.recipe, result, directory))
    return ""


def _created(run: Wanted, setup: Setup) -> RunDirectory:
    source = find(run.recipe.name)
    return RunDirectory.create(setup.recipe, source, out=run.path, overrides=run.overrides, choices=setup.choices)


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
