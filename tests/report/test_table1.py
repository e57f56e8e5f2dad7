from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fahooks.plugins import InputError
from fahooks.report import table1
from fahooks.report.table1 import Errors

Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Write OUT/<recipe>/seed-<n> by hand, with its test errors at the best epoch and at the last one."""

    def make(
        name: str,
        row: str,
        errors: tuple[float, float],
        *,
        paper: float | None = 1.0,
        seed: int = 0,
        epochs: int = 2,
        **more: Any,
    ) -> Path:
        path = tmp_path / name / f"seed-{seed}"
        path.mkdir(parents=True)
        column = name.partition("/")[0].replace("-", "_")
        published = {"table": 1, "row": row, "column": column, "error": paper}
        resolved = {"name": name, "seed": seed, "paper": published, **more.get("recipe", {})}
        (path / "resolved.yaml").write_text(yaml.safe_dump(resolved))
        result = {"test_error": errors[0], "final_test_error": errors[1]}
        (path / "status.json").write_text(json.dumps({"state": "finished", "result": result}))
        rows = [{"kind": "epoch", "epoch": epoch} for epoch in range(1, epochs + 1)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides = [*more.get("overrides", []), f"seed={seed}", "data.root=/somewhere"]
        (path / "env.json").write_text(json.dumps({"overrides": overrides}))
        return path

    return make


def test_seeds_become_mean_and_sample_standard_deviation(made: Made, tmp_path: Path):
    for seed, errors in enumerate([(1.0, 2.0), (1.2, 2.0), (1.4, 2.0)]):
        made("mnist/fa", "FA", errors, seed=seed, paper=1.1, overrides=["train.threads=1"])
    (cell,) = table1.read(tmp_path)
    assert (cell.row, cell.column, cell.recipe, cell.paper) == ("FA", "mnist", "mnist/fa", 1.1)
    assert (cell.best.mean, cell.best.spread) == pytest.approx((1.2, 0.2))
    assert (cell.last.mean, cell.last.spread) == (2.0, 0.0)
    assert (cell.best.differs, cell.last.differs) == (False, True)
    assert (cell.epochs, cell.seeds, cell.overrides) == ((2,), (0, 1, 2), ("train.threads=1",))
    assert cell.texts() == ("FA", "mnist/fa", "1.20 ± 0.20", "2.00 ± 0.00*", "1.1", "2", "3")


@pytest.mark.parametrize(
    ("errors", "paper", "differs"),
    [
        ((0.9, 0.9), 0.8, True),  # the same twice, and not the paper's
        ((0.8, 1.0), 0.8, False),
        ((0.85, 0.95), 0.8, True),
        ((1.1,), 0.8, False),  # 0.30000000000000004 away
        ((1.11,), 0.8, True),
        ((0.5,), 0.8, False),
        ((0.4,), 0.8, True),
        ((50.0,), None, False),
    ],
)
def test_what_is_further_from_the_paper_than_the_spread_is_marked(
    made: Made, tmp_path: Path, errors: tuple[float, ...], paper: float | None, differs: bool
):
    for seed, error in enumerate(errors):
        made("mnist/bp", "BP", (error, error), seed=seed, paper=paper)
    (cell,) = table1.read(tmp_path)
    assert (cell.best.differs, cell.last.differs) == (differs, differs)
    assert str(cell.best).endswith("*") is differs


def test_cells_stand_in_the_papers_order_whatever_the_disk_says(made: Made, tmp_path: Path):
    names = {"fa": "FA", "bp-noise": "BP + Noise", "dense-fa": "DenseFA", "bp": "BP", "fa-usf-init-ei": "FA-uSF Init. E/I"}
    for column in ("imagenet-2", "mnist", "cifar10-1"):
        for name, row in names.items():
            made(f"{column}/{name}", row, (1.0, 1.0))
    in_order = ["bp", "bp-noise", "fa", "fa-usf-init-ei", "dense-fa"]
    expected = [f"{column}/{name}" for column in ("mnist", "cifar10-1", "imagenet-2") for name in in_order]
    assert [cell.recipe for cell in table1.read(tmp_path)] == expected


def test_only_finished_runs_of_table_1_are_read(made: Made, tmp_path: Path):
    made("mnist/bp", "BP", (1.0, 1.0))
    running = made("mnist/bp", "BP", (90.0, 90.0), seed=1)
    (running / "status.json").write_text('{"state": "running"}')
    (running / "metrics.jsonl").unlink()
    made("mnist/fa", "FA", (1.0, 1.0), recipe={"paper": None})
    made("mnist/dfa", "DFA", (1.0, 1.0), recipe={"paper": {"table": 2}})
    (tmp_path / "mnist" / "bp" / "seed-2").mkdir()
    (tmp_path / "mnist" / "bp" / "seed-2" / ".lock").touch()
    (cell,) = table1.read(tmp_path)
    assert (cell.recipe, cell.seeds) == ("mnist/bp", (0,))
    assert table1.unfinished(tmp_path) == ["mnist/bp/seed-1 (running)", "mnist/bp/seed-2 (begun)"]


def test_a_damaged_run_is_named(made: Made, tmp_path: Path):
    path = made("mnist/bp", "BP", (1.0, 1.0))
    (path / "resolved.yaml").write_text("{[")
    with pytest.raises(InputError, match="seed-0' can not be read"):
        table1.read(tmp_path)


def test_a_run_without_a_record_of_its_overrides_has_none(made: Made, tmp_path: Path):
    (made("mnist/bp", "BP", (1.0, 1.0), overrides=["train.epochs=2"]) / "env.json").unlink()
    assert table1.read(tmp_path)[0].overrides == ()


@pytest.fixture
def cells(made: Made, tmp_path: Path) -> list[table1.Cell]:
    """Two seeds with an epoch more in one of them, one seed, and a cell that the paper left blank."""
    made("mnist/bp", "BP", (0.6, 0.55), paper=0.8)
    made("mnist/bp", "BP", (0.8, 0.55), paper=0.8, seed=1, epochs=3)
    made("mnist/bp-noise", "BP + Noise", (0.7, 0.75), paper=0.8, overrides=["data.limit=10000", "schedule={name: constant}"])
    made("cifar10-2/dfa", "DFA", (33.333, 40.0), paper=None)
    return table1.read(tmp_path)


def test_csv_has_a_line_a_cell(cells: list[table1.Cell]):
    rows = list(csv.DictReader(io.StringIO(table1.as_csv(cells))))
    assert rows[0] == {
        "row": "BP",
        "column": "mnist",
        "recipe": "mnist/bp",
        "best_error": "0.7",
        "best_spread": "0.1414",
        "best_differs": "false",
        "last_error": "0.55",
        "last_spread": "0",
        "last_differs": "true",
        "paper": "0.8",
        "epochs": "2 3",
        "seeds": "0 1",
        "overrides": "",
    }
    assert rows[1]["overrides"] == "data.limit=10000 'schedule={name: constant}'"
    assert [row["best_spread"] for row in rows[1:]] == ["", ""]
    assert (rows[2]["paper"], rows[2]["best_error"], rows[2]["best_differs"]) == ("", "33.333", "false")


def test_markdown_has_the_table_what_its_marks_mean_and_at_last_its_command(cells: list[table1.Cell]):
    lines = table1.as_markdown(cells, "fahooks reproduce table1").splitlines()
    assert lines[2:7] == [
        "| row | recipe | test error, best epoch | test error, last epoch | paper | epochs | seeds |",
        "| --- | --- | --: | --: | --: | --: | --: |",
        "| BP | mnist/bp | 0.70 ± 0.14 | 0.55 ± 0.00* | 0.8 | 2, 3 | 2 |",
        "| BP + Noise | mnist/bp-noise | 0.70 | 0.75 | 0.8 | 2 | 1 (no spread) |",
        "| DFA | cifar10-2/dfa | 33.33 | 40.00 | - | 2 | 1 (no spread) |",
    ]
    assert "one seed tells no spread, by more than 0.3 points" in " ".join(lines)
    assert lines[-3] == "changed by --set: data.limit=10000 'schedule={name: constant}' (in mnist/bp-noise)"
    assert lines[-1].strip() == "fahooks reproduce table1"


def test_the_terminals_table_says_the_same(cells: list[table1.Cell]):
    text = io.StringIO()
    Console(file=text, width=120).print(table1.table(cells))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[-3:] == [" ".join(cell.texts()) for cell in cells]


def test_files_are_written_over_and_nothing_else_stays(cells: list[table1.Cell], tmp_path: Path):
    for command in ("first", "second"):
        table1.write(tmp_path, cells, command)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["table1.csv", "table1.md"]
    assert (tmp_path / "table1.md").read_text().endswith("    second\n")
    assert (tmp_path / "table1.csv").read_text() == table1.as_csv(cells)


def test_errors_print_two_digits():
    assert [str(Errors(1.006, None, False)), str(Errors(10, 0.5, True))] == ["1.01", "10.00 ± 0.50*"]
