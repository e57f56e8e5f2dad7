"""What the user's own code raises, a model or a rule, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fahooks.plugins import InputError


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Refuse what raises any error but an `InputError`, which says itself what is wrong.

    Arguments:
        what: what can not be done, the beginning of the line.

    Raises:
        InputError: `what` with the error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The class of an error, and its words if it has any."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
