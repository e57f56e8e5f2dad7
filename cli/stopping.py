"""Ctrl-C and SIGTERM: one line, and exit code 130, at whatever a command is."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click


@contextmanager
def together(otherwise: str = "stopped before the run began") -> Iterator[None]:
    """Run the block as one of the processes that torchrun started, where it did: they share the work, and rank 0 speaks.

    It is `stoppable`; where it fails, one process says so.
    """
    from fahooks.training import distributed

    with stoppable(otherwise), distributed.joined():
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Leave at once on Ctrl-C, with exit code 130: torch, interrupted while it imports numpy, goes on with half of it."""

    def leave(*_: object) -> None:
        os.write(2, b"fahooks: stopped\n")
        os._exit(130)

    with _handled(signal.SIGINT, leave):
        yield


@contextmanager
def stoppable(otherwise: str = "stopped before the run began") -> Iterator[None]:
    """End on Ctrl-C, and on the SIGTERM that clusters send, with one line that says how to go on, exit code 130.

    Arguments:
        otherwise: the line where what was stopped has none.
    """
    with _handled(signal.SIGTERM, signal.default_int_handler):
        try:
            yield
        except KeyboardInterrupt as stop:
            click.echo(f"fahooks: {str(stop) or otherwise}", err=True)
            sys.exit(130)


@contextmanager
def _handled(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle a signal in the block, unless whoever started the process has it ignored, as a shell does for the background."""
    before = signal.getsignal(number)
    if before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
