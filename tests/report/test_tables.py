from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fahooks.report import tables
from fahooks.report.runs import Run, read_run
from fahooks.report.tables import comparison

Written = Callable[..., Path]


def printed(runs: list[Run]) -> list[list[str]]:
    text = io.StringIO()
    Console(file=text, width=140).print(comparison(runs))
    return [line.split() for line in text.getvalue().splitlines() if line.strip()]


def test_each_run_has_a_row_with_its_test_error_and_last_angles(written: Written):
    result = {"test_error": 3.456, "best_epoch": 2}
    fa = read_run(written("fa", {"conv1": 90.0, "output": 0.0}, result=result))
    bp = read_run(written("bp", {"conv1": 0.0, "output": 0.0}, result={**result, "test_error": 1.0}))
    title, header, rule, *rows = printed([bp, fa])
    assert " ".join(header) == "rule test error best epoch angle conv1 angle output time"
    assert rows == [["bp", "1.00", "%", "2", "0.0°", "0.0°", "4", "s"], ["fa", "3.46", "%", "2", "45.0°", "0.0°", "4", "s"]]


def test_what_a_run_does_not_have_is_a_dash(written: Written):
    unfinished = read_run(written("fa", {"conv1": None, "output": 0.0}))
    nothing = Run(unfinished.path, {"feedback": [{"rule": "usf"}]}, {"state": "running"}, [], [])
    *_, first, second = printed([unfinished, nothing])
    assert first == ["fa", "-", "-", "-", "0.0°", "4", "s"]
    assert second == ["usf", "-", "-", "-", "-", "-"]


def test_the_spread_is_the_sample_standard_deviation():
    assert tables.spread([]) == "-"
    assert tables.spread([1.5]) == "1.50 %"
    assert tables.spread([1.0, 2.0, 6.0]) == f"3.00 ± {math.sqrt((4 + 1 + 9) / 2):.2f} %"


def test_a_sweep_has_a_row_a_setting_of_the_runs_that_are_finished():
    def run(**result: float) -> Run:
        return Run(Path("x"), {}, {"result": result} if result else {}, [], [])

    good = [run(test_error=1.0, validation_error=2.0, best_epoch=3), run(test_error=2.0, validation_error=2.0, best_epoch=1)]
    table = tables.by_settings({"lr=[1]": good, "lr=2": [good[0], run()], "lr=3": [run()]})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    rows = [line.split("  ") for line in console.export_text().splitlines() if line.startswith("  lr")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["lr=[1]", "2", "1.50 ± 0.71 %", "2.00 ± 0.00 %", "3, 1"],
        ["lr=2", "1 of 2", "1.00 %", "2.00 %", "3"],
        ["lr=3", "0 of 1", "-", "-", "-"],
    ]
