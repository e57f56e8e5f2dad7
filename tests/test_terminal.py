from __future__ import annotations

import io
import os
import sys

import pytest
from rich.console import Console

from fahooks.terminal import on_terminal


@pytest.mark.parametrize("forced", ["", "1"])
def test_a_terminal_is_one_whatever_rich_is_told(forced: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", forced)
    text = io.StringIO()
    assert not on_terminal(text)
    assert Console(file=text).is_terminal == bool(forced), "control: rich believes it"
    ours, theirs = os.openpty()
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal:
        assert on_terminal(terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert on_terminal()
