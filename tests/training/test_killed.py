from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fahooks.data import FfcvLoader

MISSING = FfcvLoader.available()
needs_ffcv = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


def killed(folder: Path, loader: str, kills: int) -> dict[str, Any]:
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, script, folder, f"--loader={loader}", f"--kills={kills}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("loader", "kills"),
    [
        ("memory", 20),
        pytest.param("ffcv", 6, marks=needs_ffcv),
        pytest.param("memory", 200, marks=pytest.mark.slow),
        pytest.param("ffcv", 200, marks=[pytest.mark.slow, needs_ffcv]),
    ],
)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits_and_each_step_once(loader: str, kills: int, tmp_path: Path):
    told = killed(tmp_path, loader, kills)
    assert told["kills"] == kills
    assert told["inside a write"] >= kills // 2
    assert len(set(told["steps saved at each"])) > min(3, kills // 6), "control: the kills struck at different moments"
    assert set(told["the same as undisturbed"].values()) == {True}, told
