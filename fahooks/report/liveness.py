"""Whether a run that says it is running still is: what was killed has no time to say so."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What tells this process from all others, also from a later one of the same number: plain data."""
    return {**_machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def state(status: Mapping[str, Any]) -> str:
    """How a run is, by its status.json: running, finished, interrupted, failed, or killed; "begun" before it says anything.

    It is killed where it says that it is running, and the process that said so is gone. Of a process of another machine, or of
    another container, that can not be told, and it counts as running.
    """
    said = str(status.get("state", "begun"))
    return "killed" if said == "running" and _is_gone(status.get("process")) else said


def _is_gone(process: Any) -> bool:
    if not isinstance(process, Mapping) or not isinstance(process.get("pid"), int):
        return False
    here = _machine()
    if process.get("host") != here["host"]:
        return False
    if process.get("boot") != here["boot"]:  # the machine was started again since
        return True
    if process.get("namespace") != here["namespace"]:
        return False
    return not _exists(process["pid"]) or process.get("started") != _started(process["pid"])


def _machine() -> dict[str, str]:
    """The machine, when it was started, and the container whose process numbers these are; empty where that is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> int | None:
    """When a process was started, in ticks of the machine's clock; None where that is not told, or it has ended."""
    try:
        # The name of the program, in brackets, may hold spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in ("Z", "X") else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None
