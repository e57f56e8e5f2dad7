from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import CliRunner

from fahooks.cli import main
from fahooks.cli.stopping import importing, stoppable

# Ctrl-C while a module is imported that, as numpy does, takes it for a fault of its own.
INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("half of it is there")
"""

# A shell that starts tests in the background has them ignore Ctrl-C.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from fahooks.cli import main
main(prog_name="fahooks")
"""


@pytest.mark.parametrize(("context", "number"), [(importing, signal.SIGINT), (stoppable, signal.SIGTERM)])
def test_a_signal_is_handled_unless_it_is_ignored(context: Callable[[], AbstractContextManager[None]], number: signal.Signals):
    """As a shell has what it starts in the background ignore Ctrl-C."""
    before = signal.getsignal(number)
    try:
        for handler, kept in ((signal.SIG_DFL, False), (signal.SIG_IGN, True)):
            signal.signal(number, handler)
            with context():
                assert (signal.getsignal(number) is handler) == kept
            assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_a_stop_before_the_run_began_says_so(monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fahooks.training.commands.start", stop)
    done = CliRunner().invoke(main, ["train", "quickstart"])
    assert (done.exit_code, done.stderr) == (130, "fahooks: stopped before the run began\n")


@pytest.mark.parametrize("command", ["train", "reproduce", "ls"])
def test_a_stop_while_a_command_is_imported_ends_with_130(command: str, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", stop)
    done = CliRunner().invoke(main, [command])
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "fahooks: stopped\n")


@pytest.mark.parametrize(
    "command",
    [
        "bench step paper/mnist",
        "bench loop quickstart",
        "convert paper/mnist",
        "data bench quickstart",
        "data prepare quickstart",
        "doctor",
        "eval here",
        "ls rules",
        "quickstart",
        "reproduce table1",
        "show quickstart",
        "train quickstart",
        "validate quickstart",
    ],
)
def test_a_stop_while_torch_is_imported_ends_with_130(command: str, tmp_path: Path):
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fahooks: stopped\n")
