"""What ends a run before it is finished, recorded in its directory and put into one line."""

from __future__ import annotations

import errno
import re
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fahooks.plugins import Failed, InputError
from fahooks.training.distributed import fails_first, somebody_failed
from fahooks.training.run_directory import FULL, RunDirectory

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
# What RuntimeErrors say where there is no memory left: torch and its libraries, of the host and of a GPU.
NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory"),
    *("out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED"),
)
LONGEST = 500
"""Characters of a fault of the program that are told, of which compilers may have a hundred thousand; its traceback has all."""


@contextmanager
def worded() -> Iterator[None]:
    """Put into a line what goes wrong outside of the program in the block, such as that no memory is left.

    Raises:
        Failed: that; the error itself is its cause. All others pass.
    """
    try:
        yield
    except Exception as error:
        known = reason(error)
        if known is None:
            raise
        raise Failed(known) from error


@contextmanager
def recorded(run: RunDirectory, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Leave in status.json how the block ended before its time, and in failure.txt the traceback of a fault of the program.

    Of several processes the first one that fails leaves it: the others fail since it is gone.

    Arguments:
        run: what ended.
        but: what has nothing to do with the run, and passes.

    Raises:
        Failed: anything else than a stop and wrong input ended it; the error itself is its cause.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not somebody_failed():
            run.status("interrupted", resume=f"fahooks train --resume {run.path}")
        raise
    except but:
        raise
    except Exception as error:
        if not fails_first():
            raise
        known = reason(error, run)
        if known is None and isinstance(error, InputError | Failed):
            _record(run, error, str(error))
            raise
        known = known or _fault(error, run)
        _record(run, error, known)
        raise Failed(known) from error


def _record(run: RunDirectory, error: Exception, known: str) -> None:
    try:
        run.status("failed", reason=known, resume=f"fahooks train --resume {run.path}")
    except OSError as unwritable:
        error.add_note(f"status.json could not be written: {unwritable.strerror}")


def _fault(error: Exception, run: RunDirectory) -> str:
    """A line about a fault of the program, whose traceback goes into failure.txt."""
    known = textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST, placeholder=" ...")
    try:
        run.write("failure.txt", "".join(traceback.format_exception(error)))
    except OSError as unwritable:
        return f"{known}; its traceback could not be written to {run.failure}: {unwritable.strerror}"
    return f"{known}; this is a fault of fahooks or a plugin, with its traceback in {run.failure}"


def reason(error: BaseException, run: RunDirectory | None = None) -> str | None:
    """What went wrong outside of the program, and what to do; None where that is not known.

    Arguments:
        error: what was raised.
        run: the run that it ended; None where it ended something before a run.
    """
    if isinstance(error, Failed):  # it is a line already
        return None
    again = "give the same command again" if run is None else f"go on with `fahooks train --resume {run.path}`"
    if is_out_of_memory(error):
        asked = re.search(r"(?:tried to allocate|unable to allocate) ([\d.]+ \w+)", str(error), re.IGNORECASE)
        what = f" ({asked[1]} more were asked for)" if asked else ""
        lower = "with a lower data.batch_size, or a higher train.accumulate, which takes a batch in several passes"
        return f"out of memory{what}: free some, then {again}; or start anew {lower}"
    if is_lost_process(error):
        return f"another process of this run is gone, maybe killed: {again}, by torchrun again if you like"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is not None:
        where = repr(str(error.filename))
    elif run is not None:
        where = f"the run directory {str(run.path)!r}"
    else:
        return None
    if error.errno in FULL:
        kept = "; the last checkpoint is whole" if run is not None and any(run.checkpoints.glob("*.pt")) else ""
        return f"no room to write in {where} ({error.strerror}): make room, then {again}{kept}"
    if error.errno in MISSING:
        return f"{where} is missing ({error.strerror}): put it back, then {again}"
    return f"{where} can not be used ({error.strerror}): mend that, then {again}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device had no memory left, also where that was taken for something else, such as for a wrong model."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def is_lost_process(error: BaseException) -> bool:
    """Whether a process that this one trains with is gone; gloo says so in a RuntimeError, NCCL in a DistError."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    of_distributed = isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return of_distributed and any(words in str(error) for words in lost)
