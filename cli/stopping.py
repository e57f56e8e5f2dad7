"""Ctrl-C and SIGTERM: one line, and exit code 130, at whatever a command is."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stoppable(otherwise: str = "stopped before the run began") -> Iterator[None]:
    """End on Ctrl-C, and on the SIGTERM that clusters send, with one line that says how to go on, exit code 130.

    Arguments:
        otherwise: the line where what was stopped has none.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as stop:
        click.echo(f"fahooks: {str(stop) or otherwise}", err=True)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
