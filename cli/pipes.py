"""Where output goes: a reader such as `head` may leave, and the command goes on to its end; a disk may be full."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from fahooks.plugins import Failed


class Unread(io.FileIO):
    """A file descriptor that takes what nobody reads any more, and drops it.

    Arguments:
        descriptor: the descriptor, which stays open.
        terminal: whether it is a terminal, which may be closed.
    """

    def __init__(self, descriptor: int, *, terminal: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.gone = (errno.EPIPE, errno.EIO) if terminal else (errno.EPIPE,)

    def write(self, data: Any, /) -> int | None:
        """Write to the descriptor; from the first time on that its reader is gone, or the disk full, to nowhere.

        Raises:
            Failed: it can not be written, for another reason than that nobody reads it.
        """
        if not len(data):  # so click asks whether it takes bytes
            return 0
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno not in self.gone:
                raise Failed(f"what is printed can not be written: {error.strerror}") from error
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
    raw = Unread(stream.fileno(), terminal=stream.isatty())
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
