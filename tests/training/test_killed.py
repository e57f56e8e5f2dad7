from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def killed(folder: Path, kills: int) -> dict[str, Any]:
    command = [sys.executable, Path(__file__).with_name("killing.py"), folder, f"--kills={kills}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits_and_each_step_once(kills: int, tmp_path: Path):
    told = killed(tmp_path, kills)
    assert told["kills"] == kills
    assert told["inside a write"] >= kills // 2
    assert len(set(told["steps saved at each"])) > 3, "control: the kills struck at different moments"
    assert set(told["the same as undisturbed"].values()) == {True}, told
