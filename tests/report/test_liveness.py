from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fahooks.report.liveness import state, this_process


@pytest.fixture
def other() -> Any:
    """A process, and what it says of itself."""
    program = (
        "import json, sys; from fahooks.report.liveness import this_process as p; print(json.dumps(p()), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
        process.kill()


def running(process: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"state": "running", "process": {**process, **changes}}


def test_a_run_whose_process_was_killed_is_told_from_one_at_work(other: Any):
    process, said = other
    assert state(running(said)) == "running"
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert state(running(said)) == "killed", "it is still in the table of processes, and works no more"
    process.wait()
    assert state(running(said)) == "killed"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="nothing here tells when a process was started")
def test_another_process_of_that_number_is_another():
    ours = this_process()
    assert state(running(ours)) == "running"
    assert state(running(ours, started=ours["started"] - 1)) == "killed"
    assert state(running(ours, boot="another")) == "killed"


def test_what_can_not_be_told_counts_as_running():
    ours = this_process()
    for changes in ({"host": "elsewhere"}, {"namespace": "pid:[1]"}, {"pid": None}):
        assert state(running(ours, started=0, **changes)) == "running"
    assert state({"state": "running"}) == "running"


def test_other_states_are_what_the_run_says():
    for said in ("finished", "interrupted", "failed"):
        assert state({"state": said}) == said
    assert state({}) == "begun"
