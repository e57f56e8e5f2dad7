from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fahooks.plugins import InputError
from fahooks.report.runs import read_run

Written = Callable[..., Path]


def test_a_run_directory_is_read_back(written: Written):
    run = read_run(written("fa", {"conv1": 90.0, "output": 0.0}, result={"test_error": 3.0}))
    assert run.rules == "fa"
    assert [row["validation_error"] for row in run.epochs] == [30.0, 10.0]
    assert [row["angle"]["conv1"] for row in run.probes] == [90.0, 45.0]
    assert run.status["result"]["test_error"] == 3.0


@pytest.mark.parametrize("name", ["resolved.yaml", "status.json", "metrics.jsonl"])
def test_a_folder_without_its_files_is_no_run(written: Written, name: str):
    path = written("fa", {"conv1": 90.0})
    (path / name).unlink()
    with pytest.raises(InputError, match=f"is no run directory: it has no {name}"):
        read_run(path)


@pytest.mark.parametrize("name", ["resolved.yaml", "status.json", "metrics.jsonl"])
def test_a_damaged_file_is_one_line(written: Written, name: str):
    path = written("fa", {"conv1": 90.0})
    (path / name).write_text("{[\n\n")
    with pytest.raises(InputError, match="can not be read") as caught:
        read_run(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_larger_than_any_recipe_is_not_read(written: Written):
    path = written("fa", {"conv1": 90.0})
    (path / "resolved.yaml").write_text("a: 1\n" + "#" * 200_000)
    with pytest.raises(InputError, match="more than 100,000 bytes"):
        read_run(path)
