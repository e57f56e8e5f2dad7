from __future__ import annotations

import importlib
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as real_version
from pathlib import Path

import pytest

from fahooks import diagnosis, plugins
from fahooks.diagnosis import Finding


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnosis.examine()}


def test_what_the_tests_run_with_is_ok():
    here = found()
    for name in ("Python", "torch", "timm", "scikit-learn", "pyyaml", "processors", "loader memory"):
        assert here[name].state == "ok" and not here[name].remedy, here[name]
    assert here["torch"].found == real_version("torch")
    assert {f"loader {name}" for name in plugins.loaders.names()} <= set(here)


def test_what_is_not_there_comes_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def version(name: str) -> str:
        if name in ("timm", "ffcv", "numba"):
            raise PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(diagnosis, "version", version)
    monkeypatch.setattr(diagnosis, "find_library", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setenv("FAHOOKS_DATA", str(tmp_path / "nowhere"))
    here = found()
    assert (here["Python"].state, here["timm"].state) == ("missing", "missing")
    assert here["timm"].remedy == "pip install timm"
    assert {here[name].state for name in ("ffcv", "numba", "libturbojpeg", "C++ compiler", "data")} == {"absent"}
    assert here["libturbojpeg"].remedy == "apt-get install libturbojpeg0-dev"
    assert here["C++ compiler"].found.startswith("no g++")
    assert "nowhere" in here["data"].found


def test_a_torch_that_can_not_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open\n shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    (torch,) = (finding for finding in diagnosis._packages() if finding.name == "torch")
    assert torch.state == "missing"
    assert torch.found.endswith("can not be imported: libcudart.so.13: cannot open shared object file")
