from __future__ import annotations

from pathlib import Path

import pytest

from fahooks.data import FfcvLoader
from fahooks.data.ffcv import library
from fahooks.plugins import InputError
from fahooks.training.feeding import compare_loaders, prepare_data

MISSING = FfcvLoader.available()
needs_ffcv = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


@needs_ffcv
def test_files_of_both_parts_are_written_below_the_root_and_found_again(tmp_path: Path):
    files = prepare_data("quickstart", [f"data.root={tmp_path}"])
    assert [file.name.rpartition("-")[0] for file in files] == ["digits-train", "digits-test"]
    assert all(file.parent == tmp_path / "ffcv" and file.is_file() for file in files)
    times = [file.stat().st_mtime_ns for file in files]
    assert prepare_data("quickstart", [f"data.root={tmp_path}", "data.loader=ffcv", "seed=1"]) == files
    assert [file.stat().st_mtime_ns for file in files] == times


@needs_ffcv
def test_options_of_the_recipe_are_heard(tmp_path: Path):
    options = ["data.loader=ffcv", "data.loader_options.mode=jpg", f"data.loader_options.folder={tmp_path / 'here'}"]
    files = prepare_data("quickstart", [*options, f"data.root={tmp_path}"])
    assert {file.parent for file in files} == {tmp_path / "here"}
    assert '"mode": "jpg"' in files[0].with_name(files[0].name + ".json").read_text()


def test_without_ffcv_it_is_refused_and_left_out_of_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "missing", lambda: "the package ffcv is not installed: pip install it")
    root = [f"data.root={tmp_path}"]
    with pytest.raises(InputError, match="data.loader=ffcv does not work here: .*: pip install it"):
        prepare_data("quickstart", root)
    with pytest.raises(InputError, match="pip install it"):
        compare_loaders("quickstart", root, only=["ffcv"], rounds=1, seconds=0)
    measured, left_out = compare_loaders("quickstart", root, rounds=1, seconds=0)
    assert {each.loader for each in measured} == {"memory", "torchvision"}
    assert list(left_out) == ["ffcv"]
    assert list(tmp_path.iterdir()) == []
