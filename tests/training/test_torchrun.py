from __future__ import annotations

import subprocess
import sys

import pytest

from fahooks.training.torchrun import SETS, started_by_torchrun


def test_a_process_is_started_by_torchrun_where_all_that_it_sets_is_there(monkeypatch: pytest.MonkeyPatch):
    for name in SETS:
        monkeypatch.setenv(name, "0")
    assert started_by_torchrun()
    monkeypatch.delenv("LOCAL_RANK")  # as on a cluster that tells every command its rank
    assert not started_by_torchrun()


def test_leaving_runs_what_waits_for_the_exit_and_nothing_after_it():
    program = (
        "import atexit, sys; from fahooks.training.torchrun import leave\n"
        "class Torn:\n"
        "    def __del__(self): print('torn apart')\n"
        "kept = Torn(); atexit.register(print, 'at exit'); print('last words', end=' '); {}(3)"
    )
    for leave, said in (("leave", "last words at exit\n"), ("sys.exit", "last words at exit\ntorn apart\n")):
        done = subprocess.run([sys.executable, "-c", program.format(leave)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (3, said)
