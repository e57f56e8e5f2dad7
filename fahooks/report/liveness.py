"""Whether a run that says it is running still is: what was killed has no time to say so."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Who trains in a run directory holds this file in it; the system lets it go when the process ends, in whatever way.
LOCK = ".lock"


def this_process() -> dict[str, Any]:
    """Where this process runs, and its number there: plain data."""
    return {"pid": os.getpid(), **_machine()}


def state(run: Path, status: Mapping[str, Any]) -> str:
    """How a run is, by its status.json: running, finished, interrupted, failed, or killed; "begun" before it says anything.

    It is killed where it says that it is running, and nobody holds its lock. Of another machine that can not be told, and it
    counts as running.

    Arguments:
        run: its directory.
        status: what its status.json says.
    """
    said = str(status.get("state", "begun"))
    return "killed" if said == "running" and _is_gone(run, status.get("process")) else said


def _is_gone(run: Path, process: Any) -> bool:
    here = _machine()
    number = "machine" if here["machine"] else "boot"  # a container may have none of its own
    if not isinstance(process, Mapping) or not here[number] or any(process.get(key) != here[key] for key in ("host", number)):
        return False
    return not _is_held(run / LOCK)


def _machine() -> dict[str, str]:
    """The machine, by its name and by its number, and when it was started; empty where that is not told."""
    return {
        "host": socket.gethostname(),
        "machine": _read("/etc/machine-id"),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _is_held(lock: Path) -> bool:
    """Whether a process holds the file; also where that can not be told, as of a file that may not be read."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
