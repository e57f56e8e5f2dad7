from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fahooks.report import liveness
from fahooks.report.liveness import LOCK, state, this_process

HOLDS = """
import json, sys
from pathlib import Path
from fahooks.report.liveness import this_process
from fahooks.training.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).alone():
    print(json.dumps(this_process()), flush=True)
    input()
"""


def running(process: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"state": "running", "process": {**process, **changes}}


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="nothing here tells machines apart")
def test_a_run_whose_process_was_killed_is_told_from_one_at_work(tmp_path: Path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["pid"] == process.pid
        assert state(tmp_path, running(said)) == "running"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert state(tmp_path, running(said)) == "killed", "it is still in the table of processes, and works no more"
    assert state(tmp_path, running(said)) == "killed"
    assert state(tmp_path, running(this_process())) == "killed", "a number that another process has by now says nothing"


def test_a_machine_that_was_started_again_is_told_from_another_one_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liveness, "_read", lambda path: f"what stands in {path}")
    ours = this_process()
    assert state(tmp_path, running(ours, boot="another")) == "killed"
    assert state(tmp_path, running(ours, boot="another", machine="another")) == "running"


def test_a_machine_without_a_number_is_known_until_it_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liveness, "_read", lambda path: "" if path == "/etc/machine-id" else "this time")
    ours = this_process()
    assert state(tmp_path, running(ours)) == "killed"
    assert state(tmp_path, running(ours, boot="another")) == "running"


def test_what_can_not_be_told_counts_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liveness, "_read", lambda path: f"what stands in {path}")
    ours = this_process()
    assert state(tmp_path, running(ours, host="elsewhere")) == "running"
    assert state(tmp_path, {"state": "running"}) == "running"
    assert state(tmp_path, running({"host": ours["host"], "boot": ours["boot"], "pid": 1})) == "running", "of an older version"
    (tmp_path / LOCK).mkdir()
    assert state(tmp_path, running(ours)) == "running"
    monkeypatch.setattr(liveness, "_read", lambda path: "")
    assert state(tmp_path / "nowhere", running(this_process())) == "running"


def test_other_states_are_what_the_run_says(tmp_path: Path):
    for said in ("finished", "interrupted", "failed"):
        assert state(tmp_path, {"state": said}) == said
    assert state(tmp_path, {}) == "begun"
