from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from fahooks.plugins import Failed, InputError
from fahooks.training.failures import reason, recorded
from fahooks.training.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no room to write in the run directory 'r' (No space left on device)"),
        (OSError(errno.EROFS, "Read-only file system", "r/x"), "'r/x' can not be used (Read-only file system)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "d/1.png"), "'d/1.png' is missing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "out of memory (20.00 MiB more were"),
        (MemoryError(), "out of memory: free some"),
    ],
)
def test_what_is_no_fault_of_the_program_is_put_into_words(error: Exception, message: str):
    said = reason(error, RunDirectory(Path("r")))
    assert said is not None and said.startswith(message) and "go on with `fahooks train --resume r`" in said


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError("x"), KeyError("x")])
def test_what_is_not_known_is_not_guessed_at(error: Exception):
    assert reason(error, RunDirectory(Path("r"))) is None


def test_torch_runs_out_of_host_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    said = reason(caught.value, RunDirectory(Path("r")))
    assert said is not None and said.startswith(f"out of memory ({2**58} bytes more were asked for)")


def test_each_end_is_recorded(tmp_path: Path):
    run = RunDirectory(tmp_path)
    for error, raised, state in (
        (KeyboardInterrupt("why"), KeyboardInterrupt, "interrupted"),
        (InputError("why"), InputError, "failed"),
        (ZeroDivisionError("why"), Failed, "failed"),
    ):
        with pytest.raises(raised, match="why"), recorded(run):
            raise error
        assert run.read_status()["state"] == state
        assert run.failure.exists() == (raised is Failed)
    assert "ZeroDivisionError" in run.failure.read_text()
    assert run.read_status()["reason"].startswith("ZeroDivisionError: why; this is a fault of fahooks or a plugin")
