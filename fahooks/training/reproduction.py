"""Reproducing the paper's Table 1: every cell is a shipped recipe, and whatever is missing of its runs is trained."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fahooks.plugins import InputError, near
from fahooks.recipe import find, load, shipped_names
from fahooks.recipe.reading import add_file
from fahooks.recipe.tree import Tree
from fahooks.report import table1
from fahooks.training.run_directory import held
from fahooks.training.series import Wanted, carry_out, goes_on_by_itself

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
    with goes_on_by_itself():
        wanted = _plan(choose(columns, rows), seeds, overrides, out)
        return carry_out(wanted, out, advice=lambda runs: f"choose other --columns than {', '.join(_columns(runs))}")


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
    columns = dict.fromkeys(entry.typed[0] for entry in entries)
    return [
        _wanted(entry.name, seed, overrides, out)
        for column in columns
        for seed in seeds
        for entry in entries
        if entry.typed[0] == column
    ]


def _wanted(name: str, seed: int, overrides: Sequence[str], out: Path) -> Wanted:
    changed = (*overrides, f"seed={seed}")
    source = find(name)
    return Wanted(out / name / f"seed-{seed}", load(source, changed), source, changed)


def _columns(runs: Sequence[Wanted]) -> list[str]:
    return list(dict.fromkeys(run.recipe.name.rpartition("/")[0] for run in runs))
