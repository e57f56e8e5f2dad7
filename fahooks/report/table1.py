"""The paper's Table 1 beside our own: from run directories to a table, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from fahooks.plugins import InputError
from fahooks.report.liveness import state
from fahooks.report.runs import Run, read_run

COLUMNS = ("mnist", "cifar10_1", "cifar10_2", "imagenet_1", "imagenet_2")
ROWS = (
    "BP",
    "BP + Noise",
    "BP + Alignment",
    "FA",
    "FA-uSF Init. E/I",
    "FA-uSF Init.",
    "FA-uSF SN",
    "DFA",
    "DenseFA",
    "BP Const.",
    "FA-uSF Const.",
    "FA-uSF Const. E/I",
)
"""The rows and columns, in the paper's order and spelling."""

NOTABLE = 0.3
"""How many percentage points from the paper's error are marked where one seed tells no spread."""

TITLE = "Table 1: test error in percent, ours beside that of Moskovitz et al. 2018"

CAPTION = (
    "Mean ± sample standard deviation over the seeds. Best epoch: that of the lowest validation error; last epoch: the weights "
    "that training ended with. The paper rounds to 0.1 and does not say which of the two it reports; where it has -, it left the "
    "cell blank. An asterisk marks what differs from it by more than our spread or, where one seed tells no spread, by more than "
    f"{NOTABLE:g} points."
)

HEADER = ("row", "recipe", "test error, best epoch", "test error, last epoch", "paper", "epochs", "seeds")


@dataclass(frozen=True)
class Errors:
    """Test errors of one cell.

    Attributes:
        mean: over the seeds, in percent.
        spread: sample standard deviation over the seeds, in percentage points; None for one seed.
        differs: whether the paper's number is further away than the spread, or than `NOTABLE` where there is none.
    """

    mean: float
    spread: float | None
    differs: bool

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:.2f}{spread}{'*' if self.differs else ''}"


@dataclass(frozen=True)
class Cell:
    """One row of one column.

    Attributes:
        row: as the paper spells it.
        column: as the paper's table spells it.
        recipe: its name.
        best: at the epochs that validation chose.
        last: of the last weights.
        paper: the published error in percent; None where the paper left the cell blank.
        epochs: how many each run took: one number where all took as many.
        seeds: whose runs are finished.
        overrides: what `--set` changed, other than seed and data.root.
    """

    row: str
    column: str
    recipe: str
    best: Errors
    last: Errors
    paper: float | None
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]

    def texts(self) -> tuple[str, ...]:
        """What stands under `HEADER`."""
        paper = "-" if self.paper is None else f"{self.paper:g}"
        seeds = "1 (no spread)" if len(self.seeds) == 1 else str(len(self.seeds))
        epochs = ", ".join(map(str, self.epochs))
        return (self.row, self.recipe, str(self.best), str(self.last), paper, epochs, seeds)


def read(folder: Path) -> list[Cell]:
    """The cells that have finished runs in `folder`, in the paper's order, column by column.

    Arguments:
        folder: holds <recipe name>/seed-<n> for each run; runs of recipes that are not of Table 1 are left out.

    Raises:
        InputError: a run directory is damaged.
    """
    runs: dict[str, list[Run]] = {}
    for path in _directories(folder):
        if _state(path) == "finished":
            run = read_run(path)
            if (run.recipe.get("paper") or {}).get("table") == 1:
                runs.setdefault(run.recipe["name"], []).append(run)
    return sorted((_cell(of_one) for of_one in runs.values()), key=lambda cell: order(cell.row, cell.column))


def unfinished(folder: Path) -> list[str]:
    """The runs in `folder` that the table leaves out, each with its state."""
    states = {path: _state(path) for path in _directories(folder)}
    return [f"{path.relative_to(folder)} ({said})" for path, said in states.items() if said != "finished"]


def order(row: str, column: str) -> tuple[int, int]:
    """The place of a cell, column by column; what the paper does not have comes last."""
    return (
        COLUMNS.index(column) if column in COLUMNS else len(COLUMNS),
        ROWS.index(row) if row in ROWS else len(ROWS),
    )


def table(cells: Sequence[Cell]) -> Table:
    """The table for a terminal; `CAPTION` says what its numbers are."""
    made = Table(box=box.SIMPLE_HEAD, title=TITLE, title_justify="left", show_edge=False, pad_edge=False)
    for name in HEADER:
        made.add_column(name, justify="left" if name in ("row", "recipe") else "right", overflow="fold")
    for cell in cells:
        made.add_row(*cell.texts())
    return made


def changes(cells: Sequence[Cell]) -> list[str]:
    """What `--set` changed of the recipes, a line for each set of changes with the cells that have them."""
    changed: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        changed.setdefault(cell.overrides, []).append(cell.recipe)
    return [f"changed by --set: {_typed(settings)} (in {', '.join(names)})" for settings, names in changed.items() if settings]


def as_csv(cells: Sequence[Cell]) -> str:
    """One line a cell, under the header that its first line gives; a spread or paper's error that there is none of is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = [f"{which}_{part}" for which in ("best", "last") for part in ("error", "spread", "differs")]
    writer.writerow(["row", "column", "recipe", *errors, "paper", "epochs", "seeds", "overrides"])
    for cell in cells:
        numbers = [_number(value) for which in (cell.best, cell.last) for value in asdict(which).values()]
        lists = [" ".join(map(str, values)) for values in (cell.epochs, cell.seeds)]
        writer.writerow([cell.row, cell.column, cell.recipe, *numbers, _number(cell.paper), *lists, _typed(cell.overrides)])
    return text.getvalue()


def as_markdown(cells: Sequence[Cell], command: str) -> str:
    """Title, table, caption, what was changed and, as the last line, the command that makes it."""
    aligned = ["---" if name in ("row", "recipe") else "--:" for name in HEADER]
    rows = [f"| {' | '.join(texts)} |" for texts in (HEADER, aligned, *(cell.texts() for cell in cells))]
    said = [text for line in changes(cells) for text in (line, "")]
    return "\n".join([f"# {TITLE}", "", *rows, "", CAPTION, "", *said, f"    {command}", ""])


def write(folder: Path, cells: Sequence[Cell], command: str) -> None:
    """Write table1.csv and table1.md into `folder`, each whole at every moment, also where several processes write them."""
    for name, text in (("table1.csv", as_csv(cells)), ("table1.md", as_markdown(cells, command))):
        partial = folder / f"{name}.{os.getpid()}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)


def _directories(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*/*/seed-*")) if path.is_dir())


def _state(path: Path) -> str:
    file = path / "status.json"
    try:
        return state(path, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    except (ValueError, AttributeError) as error:
        raise InputError(f"{str(file)!r} is damaged: move the run away, or start it anew") from error


def _cell(runs: Sequence[Run]) -> Cell:
    recipe = runs[0].recipe
    paper = recipe["paper"]
    results = [run.status["result"] for run in runs]
    return Cell(
        row=paper["row"],
        column=paper["column"],
        recipe=recipe["name"],
        best=_errors([result["test_error"] for result in results], paper["error"]),
        last=_errors([result["final_test_error"] for result in results], paper["error"]),
        paper=paper["error"],
        epochs=tuple(sorted({len(run.epochs) for run in runs})),
        seeds=tuple(sorted(run.recipe["seed"] for run in runs)),
        overrides=_overrides(runs[0].path),
    )


def _errors(errors: Sequence[float], paper: float | None) -> Errors:
    mean = statistics.mean(errors)
    spread = statistics.stdev(errors) if len(errors) > 1 else None
    # Rounded, since 1.1 - 0.8 is more than 0.3 in binary.
    differs = paper is not None and round(abs(mean - paper) - (NOTABLE if spread is None else spread), 9) > 0
    return Errors(mean, spread, differs)


def _overrides(path: Path) -> tuple[str, ...]:
    file = path / "env.json"
    given = json.loads(file.read_text(encoding="utf-8"))["overrides"] if file.is_file() else []
    return tuple(override for override in given if override.partition("=")[0] not in ("seed", "data.root"))


def _typed(overrides: Sequence[str]) -> str:
    return shlex.join(overrides)


def _number(value: float | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    return f"{value:.4f}".rstrip("0").rstrip(".")
