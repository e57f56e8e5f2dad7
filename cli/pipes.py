"""Pipes: a reader such as `head` may leave when it has seen enough, and the command goes on to its end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Unread(io.FileIO):
    """A file descriptor that takes what nobody reads any more, and drops it."""

    def write(self, data: Any, /) -> int | None:
        """Write to the descriptor; from the first time on that its reader is gone, to nowhere."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Let what is printed in the block have no reader: the command does what it does, and ends with its own exit code.

    Otherwise `fahooks train RECIPE | head` would end the run, and `fahooks ls rules | head -n 1` with exit code 1. Streams that a
    program, such as a test, has put in the place of the standard ones stay as they are.
    """
    names = [name for name in ("stdout", "stderr") if getattr(sys, name) is not None and _is_standard(name)]
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        stream.flush()
        setattr(sys, name, _tolerant(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _is_standard(name: str) -> bool:
    return getattr(sys, name) is getattr(sys, f"__{name}__") and isinstance(getattr(sys, name), io.TextIOWrapper)


def _tolerant(stream: io.TextIOWrapper) -> TextIO:
    raw = Unread(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
