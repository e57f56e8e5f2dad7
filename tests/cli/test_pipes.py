from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAHOOKS = [sys.executable, "-m", "fahooks"]
SMALL = [f"--set={o}" for o in ("data.limit=120", "train.epochs=3", "train.device=cpu")]


def unread(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose reader is gone before it prints a word."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=cwd, check=False, env={**os.environ, **environment}
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("arguments", "unbuffered", "code"),
    [
        (["--help"], "1", 0),
        (["ls", "recipes", "mnist/*"], "", 0),
        (["show", "mnist/fa"], "", 0),
        (["validate", "mnist/fo"], "1", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_nobody_reads_ends_as_it_would(arguments: list[str], unbuffered: str, code: int):
    done = unread(*FAHOOKS, *arguments, PYTHONUNBUFFERED=unbuffered)
    said = "fahooks: the recipe is wrong\n" if code else ""
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    "arguments", [["ls", "rules"], ["show", "mnist/fa"], ["--help"], ["convert", "paper/mnist"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["1", ""], ids=["unbuffered", "buffered"])
def test_what_can_not_be_written_is_one_line(arguments: list[str], unbuffered: str):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*FAHOOKS, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    said = "fahooks: what is printed can not be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_without_it_the_command_fails():
    """The control."""
    program = "import rich.console\nrich.console.Console().print('x')"
    assert unread(sys.executable, "-c", program).returncode == 1


def test_a_run_that_nobody_reads_is_trained_to_its_end(tmp_path: Path):
    done = unread(*FAHOOKS, "train", "quickstart", *SMALL, "--out", "here", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "here" / "status.json").read_text())["state"] == "finished"


@pytest.mark.skipif(sys.platform != "linux", reason="what a closed terminal does is the kernel's to say")
def test_a_run_outlives_its_terminal(tmp_path: Path):
    window, terminal = os.openpty()
    command = [*FAHOOKS, "train", "quickstart", *SMALL, "--out", "here"]
    run = subprocess.Popen(command, stdout=terminal, stderr=terminal, cwd=tmp_path)
    os.close(terminal)
    assert os.read(window, 1), "it has begun"
    os.close(window)
    assert run.wait(100) == 0
    assert json.loads((tmp_path / "here" / "status.json").read_text())["state"] == "finished"
