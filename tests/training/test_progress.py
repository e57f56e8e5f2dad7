from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fahooks.training.progress import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_of_80_columns_shows_loss_error_speed_and_time_left():
    text = Terminal()
    with Display("mnist/fa-usf-init", Console(file=text, force_terminal=True, width=80), steps=100, done=40) as display:
        display.step(50, epoch="12/25", loss=0.5, error=12.25, speed=1234.0)
        display.line("epoch 1/3 [done]")
        display.bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    bar = next(line for line in re.split(r"[\r\n]", shown) if "12/25" in line)
    for part in ("fa-usf-init", "epoch 12/25", "loss 0.500", "error 12.25 %", "1,234 images/s"):
        assert part in bar
    assert re.search(r"(\d|-):(\d\d|--)$", bar.rstrip())
    assert "…" not in bar
    assert "epoch 1/3 [done]" in shown


@pytest.mark.parametrize("forced", ["", "1"])
def test_elsewhere_there_are_plain_lines_only(forced: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", forced)
    text = io.StringIO()
    line = "epoch 1/3 [done] " + "x" * 300
    assert Console(file=text).is_terminal == bool(forced), "control: rich takes any output for a terminal then"
    with Display("mnist/fa", Console(file=text), steps=100) as display:
        display.step(50, epoch="2/3", loss=0.5, error=12.3, speed=1234.5)
        display.line(line)
    assert text.getvalue() == f"{line}\n"
