from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

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
