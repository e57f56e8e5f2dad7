from __future__ import annotations

import re
from functools import partial

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from fahooks.cli import tables
from fahooks.cli.tables import print_result, print_rows

ROWS = [("fa", "B [N, C] is fixed", ""), ("usf", "x" * 200, "scale=None")]


def result() -> Table:
    table = Table("rule", "error", box=box.SIMPLE)
    table.add_row("fa", "2.59 ± 1.12 %")
    return table


def test_rows_into_a_pipe_are_lines_of_cells(capsys: pytest.CaptureFixture[str]):
    print_rows(("name", "summary", "options"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "name\tsummary\toptions",
        "fa\tB [N, C] is fixed",
        f"usf\t{'x' * 200}\tscale=None",
    ]


def test_rows_on_a_terminal_fold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "on_terminal", lambda: True)
    monkeypatch.setattr(tables, "Console", partial(Console, force_terminal=True, width=60, no_color=True))
    print_rows(("name", "summary", "options"), ROWS)
    printed = capsys.readouterr().out
    assert "B [N, C] is fixed" in printed and "\t" not in printed
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= 60 for line in printed.splitlines())


def test_results_into_a_pipe_have_no_blanks_at_line_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    print_result(result())
    printed = capsys.readouterr().out
    assert "fa" in printed and "2.59 ± 1.12 %" in printed
    assert all(line == line.rstrip() for line in printed.splitlines())
    Console(width=120).print(Table("rule", box=box.SIMPLE))
    assert " \n" in capsys.readouterr().out, "control: rich itself fills lines up"
