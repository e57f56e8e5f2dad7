from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fahooks.plugins import Failed, InputError
from fahooks.training import commands
from fahooks.training.device import OF_THE_USER
from fahooks.training.failures import is_out_of_memory, reason, recorded, worded
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


def test_every_library_says_in_its_own_way_that_there_is_no_memory():
    for asks in (lambda: np.empty(2**58, np.uint8), lambda: bytearray(2**62), lambda: mmap.mmap(-1, 2**60)):
        with pytest.raises((MemoryError, OSError)) as caught:
            asks()
        said = reason(caught.value)
        assert said is not None and said.startswith("out of memory") and "give the same command again" in said
    for said in ("std::bad_alloc", "CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(said))
    taken_for_another = InputError("model 'x' could not be built")
    taken_for_another.__cause__ = MemoryError()
    assert is_out_of_memory(taken_for_another)
    assert not is_out_of_memory(OSError(errno.EIO, "Input/output error"))


def test_before_a_run_there_is_a_line_too():
    with pytest.raises(Failed, match="^out of memory: free some, then give the same command again; or start anew with a lower"):
        with worded():
            raise MemoryError
    for passes in (InputError("x"), ZeroDivisionError(), Failed("out of memory: as it was")):
        with pytest.raises(type(passes)) as caught, worded():
            raise passes
        assert caught.value is passes


def test_each_end_is_recorded(tmp_path: Path):
    run = RunDirectory(tmp_path)
    for error, raised, state in (
        (KeyboardInterrupt("why"), KeyboardInterrupt, "interrupted"),
        (InputError("why"), InputError, "failed"),
        (Failed("why"), Failed, "failed"),
        (ZeroDivisionError("why"), Failed, "failed"),
    ):
        with pytest.raises(raised, match="why"), recorded(run):
            raise error
        assert run.read_status()["state"] == state
        assert run.failure.exists() == isinstance(error, ZeroDivisionError)
    assert "ZeroDivisionError" in run.failure.read_text()
    assert run.read_status()["reason"].startswith("ZeroDivisionError: why; this is a fault of fahooks or a plugin")


def test_what_a_compiler_says_at_length_is_told_in_short(tmp_path: Path):
    run = RunDirectory(tmp_path)
    with pytest.raises(Failed, match=r"y y y [.]{3}; this is a fault") as caught, recorded(run):
        raise ValueError("y " * 50_000)
    assert len(str(caught.value)) < 1_000
    assert "y " * 40_000 in run.failure.read_text()


def test_without_a_checkpoint_none_is_said_to_be_whole(tmp_path: Path):
    run, full = RunDirectory(tmp_path), OSError(errno.ENOSPC, "No space left on device")
    assert "is whole" not in str(reason(full, run))
    run.checkpoints.mkdir()
    (run.checkpoints / "step-000000001.pt").touch()
    assert str(reason(full, run)).endswith("; the last checkpoint is whole")


LARGE = [
    f"--set={o}" for o in ("data.batch_size=1300", "train.epochs=6", "train.threads=1", "train.device=cpu", "probes.every=null")
]


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc, and limited by RLIMIT_AS")
@pytest.mark.parametrize(
    ("step", "allocator"),
    [
        # All that is large is mapped when it is asked for, and given back at once: none of it is there from before.
        (0, {"MALLOC_MMAP_THRESHOLD_": "65536"}),
        (4, {"MALLOC_MMAP_THRESHOLD_": "65536"}),
        (4, {}),  # as training tunes it, with a heap that is kept
    ],
    ids=["0", "4", "4 of a kept heap"],
)
def test_a_run_for_which_there_is_no_memory_says_so_in_a_line_and_keeps_its_checkpoint(
    step: int, allocator: dict[str, str], tmp_path: Path
):
    script = Path(__file__).with_name("short_of_memory.py")
    command = [sys.executable, str(script), str(step), "12", "train", "quickstart", *LARGE, "--out", "run"]
    own = {name: value for name, value in os.environ.items() if name not in OF_THE_USER}
    environment = {**own, "OMP_NUM_THREADS": "1", **allocator}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert re.match(r"fahooks: out of memory( \(.* more were asked for\))?: free some, then ", done.stderr)
    assert "lower data.batch_size" in done.stderr
    if not step:
        assert list(tmp_path.iterdir()) == []
        return
    run = RunDirectory(tmp_path / "run")
    assert f"fahooks: {run.read_status()['reason']}\n" == done.stderr
    run.status("interrupted")
    command = [*command[:2], "0", "1", *command[4:], "--resume", "auto"]  # no room for the images
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (1, f"fahooks: {run.read_status()['reason']}\n")
    assert run.read_status()["state"] == "failed" and done.stderr.startswith("fahooks: out of memory")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000003.pt"]
    assert commands.resume(run.path).startswith("quickstart: test error")
    assert [row["step"] for row in run.rows("epoch")] == [1, 2, 3, 4, 5, 6]
