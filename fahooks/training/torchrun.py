"""A process that torchrun started: how it knows, and how it leaves. torch itself is not imported, which takes seconds."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

SETS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def started_by_torchrun() -> bool:
    """Whether this process is one of those that torchrun starts."""
    return os.environ.keys() >= SETS


def leave(code: int) -> NoReturn:
    """Exit, as `sys.exit` does at the end of a program, but without taking the interpreter apart.

    Threads of gloo and of autograd that outlive FSDP2's process group may ask for it meanwhile, which crashes
    (https://github.com/pytorch/pytorch/issues/190489): torchrun would take a run that is finished for one that failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
