"""Disks without room, and folders that can not be written, for real."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fahooks.cli import main
from fahooks.training.run_directory import RunDirectory

SMALL = [f"--set={o}" for o in ("data.limit=200", "train.epochs=2", "train.device=cpu", "train.threads=1")]


def fahooks(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(done: Result) -> str:
    """What was said on stderr: one line, and no traceback."""
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    return line


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_for_a_checkpoint_is_found_out_before_the_first_step(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    with files_at_most(2**19):
        line = one_line(fahooks("train", "quickstart", *SMALL, "--out", run.path))
    assert line.startswith("fahooks: no room to write in the run directory ") and "File too large" in line
    status = run.read_status()
    assert (status["state"], f"fahooks: {status['reason']}") == ("failed", line)
    assert list(run.checkpoints.iterdir()) == []
    assert fahooks("train", "--resume", run.path).exit_code == 0
    assert run.finished


def test_a_disk_without_room_for_the_run_itself_is_a_failure_too(tmp_path: Path):
    with files_at_most(16):
        line = one_line(fahooks("train", "quickstart", *SMALL, "--out", tmp_path / "run"))
    assert line == f"fahooks: '{tmp_path}/run' can not be written: File too large; make room, then give the same command again"
    assert fahooks("train", "quickstart", *SMALL, "--out", tmp_path / "run").exit_code == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB, which root can mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while filler.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_from_which_the_run_goes_on(disk: Path, tmp_path: Path):
    """The first checkpoint, of 1.3 MB, fits; the next one, with Adam's moments, is of 5 MB."""
    whole, run = RunDirectory(tmp_path / "whole"), RunDirectory(disk / "run")
    assert fahooks("train", "quickstart", *SMALL, "--out", whole.path).exit_code == 0
    line = one_line(fahooks("train", "quickstart", *SMALL, "--out", run.path))
    assert line.startswith("fahooks: no room to write in ") and "No space left on device" in line
    assert line.endswith(f"then go on with `fahooks train --resume {run.path}`; the last checkpoint is whole")
    assert run.read_status()["state"] == "failed"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000000.pt"]
    run.status("interrupted")
    fill(disk / "filler")
    line = one_line(fahooks("train", "--resume", run.path))  # not even a kilobyte is left
    assert "No space left on device" in line
    assert json.loads((run.path / "status.json").read_text())["state"] == "failed"
    (disk / "new").mkdir()
    fill(disk / "more")
    with pytest.raises(OSError, match="No space left"):
        RunDirectory(disk / "new").status("failed")  # which has no block yet
    for filler in ("filler", "more"):
        (disk / filler).unlink()
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    done = fahooks("train", "--resume", run.path)
    assert done.exit_code == 0, done.output
    assert run.best.read_bytes() == whole.best.read_bytes()


def test_a_folder_that_becomes_read_only_is_one_line(disk: Path):
    run = RunDirectory(disk / "run")
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    assert fahooks("train", "quickstart", *SMALL, "--out", run.path).exit_code == 0
    run.status("interrupted")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = fahooks("train", "--resume", run.path)
    assert (done.exit_code, done.stderr) == (2, f"fahooks: {str(run.path)!r} is not writable: Read-only file system\n")
    done = fahooks("train", "quickstart", *SMALL, "--out", disk / "new")
    assert done.exit_code == 2
    assert done.stderr.endswith("can not be made: Read-only file system\n")


def test_images_that_are_gone_are_one_line_and_the_run_says_so(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    assert fahooks("train", "quickstart", *SMALL, "--out", run.path).exit_code == 0
    run.status("interrupted")
    gone = run.path / "resolved.yaml"
    gone.write_text(gone.read_text().replace("dataset: digits", "dataset: mnist").replace("download: true", "download: false"))
    done = fahooks("train", "--resume", run.path)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert run.read_status()["state"] == "failed" and f"fahooks: {run.read_status()['reason']}" == line
