"""What this machine has for training, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from fahooks import plugins
from fahooks.data.datasets import default_root
from fahooks.data.threads import usable_cores

PYTHONS = ((3, 11), (3, 14))
SYSTEM_LIBRARIES = {"opencv_core": "libopencv-dev", "turbojpeg": "libturbojpeg0-dev"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: what.
        state: "ok"; "missing" where training needs it; "absent" where it only makes training better.
        found: what is there, or what is lost without it.
        remedy: the line that installs or mends it; empty where nothing has to be done.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything that training depends on, in the order in which one would mend it. Nothing is installed or written."""
    return [*_python(), *_packages(), *_devices(), *_compiler(), *_loaders(), *_threads(), *_places()]


def _python() -> Iterator[Finding]:
    lowest, above = PYTHONS
    fits = lowest <= sys.version_info[:2] < above
    yield Finding(
        "Python", "ok" if fits else "missing", platform.python_version(), "" if fits else "install Python 3.11, 3.12 or 3.13"
    )


def _packages() -> Iterator[Finding]:
    """The packages that fahooks requires, by their metadata and by importing the one that most often is broken."""
    for requirement in requires("fahooks") or []:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            found = Finding(name, "ok", version(name))
        except PackageNotFoundError:
            found = Finding(name, "missing", "not installed", f"pip install {name}")
        if name == "torch" and found.state == "ok":
            found = _imported("torch", found)
        yield found


def _imported(name: str, found: Finding) -> Finding:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken library may raise anything
        reason = " ".join(str(error).split())
        return Finding(name, "missing", f"{found.found}, can not be imported: {reason}", f"pip install --force-reinstall {name}")
    return found


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # its own finding says so
        return
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU alone"
    if not torch.cuda.is_available():
        yield Finding("GPU", "absent", f"none that torch can use, {built}: training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {built}")


def _compiler() -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or "g++"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    there = shutil.which(compiler), headers.is_file()
    if all(there):
        yield Finding("C++ compiler", "ok", f"{compiler} and Python's headers, for train.compile")
    else:
        lacking = " and ".join(what for what, has in zip((compiler, "Python.h"), there, strict=True) if not has)
        yield Finding("C++ compiler", "absent", f"no {lacking}: train.compile does not work", "apt-get install g++ python3-dev")


def _loaders() -> Iterator[Finding]:
    """The registered loaders, and what FFCV is built from."""
    for entry in plugins.loaders:
        reason = getattr(entry.target, "available", lambda: None)()
        yield Finding(f"loader {entry.name}", "absent" if reason else "ok", reason or entry.summary)
    for package in ("ffcv", "numba"):
        try:
            yield _imported(package, Finding(package, "ok", version(package)))
        except PackageNotFoundError:
            yield Finding(package, "absent", "not installed: no loader ffcv", "make ffcv")
    for library, package in SYSTEM_LIBRARIES.items():
        found = find_library(library)
        lost = f"no lib{library}: FFCV can not be built"
        yield (
            Finding(f"lib{library}", "ok", found)
            if found
            else Finding(f"lib{library}", "absent", lost, f"apt-get install {package}")
        )


def _threads() -> Iterator[Finding]:
    said = ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ)
    torch = sys.modules.get("torch")
    own = f", torch takes {torch.get_num_threads()} threads" if torch else ""
    yield Finding("processors", "ok", f"{usable_cores()} of {os.cpu_count()}{own}{f' ({said})' if said else ''}")


def _places() -> Iterator[Finding]:
    """Where runs are written and data are read."""
    yield _room("runs", Path("runs"))
    root = Path(default_root()).expanduser()
    if root.is_dir():
        yield _room("data", root, f", {len(list(root.iterdir()))} entries")
    else:
        remedy = "export FAHOOKS_DATA=FOLDER, or let data.download fetch what it can"
        yield Finding("data", "absent", f"{root} is not there", remedy)


def _room(name: str, folder: Path, more: str = "") -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**30
    if there.is_dir() and os.access(there, os.W_OK):
        return Finding(name, "ok", f"{folder}, {free:.1f} GiB free{more}")
    needed = "missing" if name == "runs" else "absent"
    return Finding(name, needed, f"{folder} can not be written{more}", "name another folder with --out" if name == "runs" else "")
