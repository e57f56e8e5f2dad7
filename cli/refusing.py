"""What the user's own code raises, a model or a rule, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fahooks.plugins import InputError, one_line


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
