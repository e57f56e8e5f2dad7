from __future__ import annotations

import pytest
from click.testing import CliRunner

from fahooks import diagnosis
from fahooks.cli import main
from fahooks.diagnosis import Finding


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("absent", 0), ("missing", 1)])
def test_a_line_each_and_exit_1_if_something_is_missing(state: str, code: int, monkeypatch: pytest.MonkeyPatch):
    findings = [Finding("Python", "ok", "3.12.1"), Finding("[x]", state, "not there", "get it")]
    monkeypatch.setattr(diagnosis, "examine", lambda: findings)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == code
    assert done.stdout.splitlines() == ["Python  ok       3.12.1", f"[x]     {state:<7}  not there -> get it"]
