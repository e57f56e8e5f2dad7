"""Whether what is printed is looked at, or read by a program."""

from __future__ import annotations

import sys
from typing import IO


def on_terminal(file: IO[str] | None = None) -> bool:
    """Whether `file`, by default standard output, is a terminal, on which a line can be drawn over.

    rich takes anything for one by FORCE_COLOR, so that it colours it: right for results, not for bars and YAML.
    """
    return (sys.stdout if file is None else file).isatty()
