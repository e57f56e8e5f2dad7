from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fahooks.plugins import InputError
from fahooks.recipe import Recipe, Source, load
from fahooks.report.liveness import this_process
from fahooks.training.run_directory import RunDirectory, fresh_directory

Tiny = Callable[..., Recipe]


def make(tiny: Tiny, path: Path | None) -> RunDirectory:
    return RunDirectory.create(tiny(), Source("r.yaml", "the text\n"), out=path, overrides=["seed=3"])


def test_what_is_known_before_training_is_written(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "deep" / "run")
    assert (run.path / "recipe.yaml").read_text() == "the text\n"
    assert load(Source("resolved.yaml", (run.path / "resolved.yaml").read_text())) == tiny()
    environment = json.loads((run.path / "env.json").read_text())
    assert environment["overrides"] == ["seed=3"]
    assert environment["packages"]["torch"] and environment["python"]


def test_by_default_runs_are_numbered(tiny: Tiny, in_tmp: Path):
    assert [make(tiny, None).path for _ in range(3)] == [Path(f"runs/tiny-{n}") for n in (1, 2, 3)]
    assert fresh_directory(None, "mnist/fa") == Path("runs/mnist/fa-1")


def test_a_folder_that_holds_something_is_not_overwritten(tiny: Tiny, tmp_path: Path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(InputError, match=r"is not empty: name a new folder$"):
        make(tiny, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(InputError, match="is a file"):
        make(tiny, tmp_path / "precious")
    with pytest.raises(InputError, match="can not be made: Not a directory"):
        make(tiny, tmp_path / "precious" / "run")
    (tmp_path / "empty").mkdir()
    assert make(tiny, tmp_path / "empty").path == tmp_path / "empty"
    with pytest.raises(InputError, match=r"is not empty: name a new folder, or go on with `fahooks train --resume .*empty`$"):
        make(tiny, tmp_path / "empty")


def test_a_folder_that_can_not_be_made_is_one_line(in_tmp: Path):
    Path("runs").write_text("")
    with pytest.raises(InputError, match="can not be made") as caught:
        fresh_directory(None, "x")
    assert "\n" not in str(caught.value)


def test_status_replaces_and_metrics_append(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "run")
    run.status("running")
    run.status("failed", reason="why")
    assert (run.read_status()["state"], run.read_status()["reason"]) == ("failed", "why")
    run.log("epoch", epoch=1, step=5, lr=0.1)
    run.log("probe", epoch=1, step=5, angle={"a": float("nan"), "b": 2.0}, ratio=float("inf"))
    assert run.rows("epoch") == [{"kind": "epoch", "epoch": 1, "step": 5, "lr": 0.1}]
    assert run.rows("probe") == [{"kind": "probe", "epoch": 1, "step": 5, "angle": {"a": None, "b": 2.0}, "ratio": None}]
    assert "NaN" not in run.metrics.read_text()
    assert not list(run.path.glob("*.partial"))


def rows(run: RunDirectory) -> list[dict[str, str]]:
    return list(csv.DictReader((run.path / "summary.csv").read_text().splitlines()))


def test_the_summary_has_a_row_an_epoch_and_the_tested_errors(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "run")
    for epoch in (1, 2, 3):
        run.log("epoch", epoch=epoch, step=5 * epoch, validation_error=10.0 / epoch)
    run.log("test", weights="final", epoch=3, test_error=4.0)
    run.log("test", weights="best", epoch=2, test_error=3.0)
    run.summarise()
    assert [(r["epoch"], r["step"], r["test_error"]) for r in rows(run)] == [
        ("1", "5", ""),
        ("2", "10", "3.0"),
        ("3", "15", "4.0"),
    ]


def test_what_a_resumed_run_will_write_again_is_trimmed(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "run")
    for epoch in (1, 2, 3):
        run.log("probe", epoch=epoch, step=5 * epoch - 5)
        run.log("probe", epoch=epoch, step=5 * epoch - 2)
        run.log("epoch", epoch=epoch, step=5 * epoch)
    run.log("test", epoch=1, test_error=1.0)
    with run.metrics.open("a") as file:
        file.write('{"kind": "epo')
    (run.path / "summary.csv.partial").write_text("half")
    run.checkpoints.mkdir()
    (run.checkpoints / "step-000000012.pt.partial").write_text("half")
    run.trim(2, 12)
    assert [r["step"] for r in run.rows("epoch")] == [5, 10]
    assert [r["step"] for r in run.rows("probe")] == [0, 3, 5, 8, 10]
    assert run.rows("test") == []
    assert [r["epoch"] for r in rows(run)] == ["1", "2"]
    assert list(run.path.rglob("*.partial")) == []
    run.trim(1, 5)
    assert [r["step"] for r in run.rows("epoch")] == [5]
    assert [r["step"] for r in run.rows("probe")] == [0, 3]


def test_rows_that_a_run_counts_and_has_not_are_told(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "run")
    assert run.lost(0, 0, 4) == run.lost(0, 0, None) == ""
    for epoch in (1, 2, 3):
        run.log("probe", epoch=epoch, step=4 * epoch - 4)
        run.log("epoch", epoch=epoch, step=4 * epoch)
    assert run.lost(3, 12, 4) == run.lost(3, 9, 4) == run.lost(3, 12, None) == ""
    assert run.lost(3, 13, 4) == "1 of probes, from step 12 on"
    assert run.lost(5, 20, None) == "2 of epochs, from epoch 4 on"
    assert run.lost(4, 20, 4) == "1 of epochs, from epoch 4 on, and 2 of probes, from step 12 on"


@pytest.mark.parametrize(
    "damage",
    [
        b"\0\0\0",
        b'{"kind": "epo\0\0',
        b"\xff\xfe",
        b"3",
        b"[]",
        b"{}",
        b'{"kind": "epoch"}',
        b'{"kind": ["epoch"], "epoch": 2}',
        b"",
    ],
)
def test_a_damaged_row_is_one_that_is_lost(tiny: Tiny, tmp_path: Path, damage: bytes):
    run = make(tiny, tmp_path / "run")
    for epoch in (1, 2, 3):
        run.log("epoch", epoch=epoch, step=5 * epoch)
    lines = run.metrics.read_bytes().split(b"\n")
    run.metrics.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    assert run.lost(3, 15, None) == "1 of epochs, from epoch 2 on"
    run.trim(3, 15)
    assert run.metrics.read_bytes().split(b"\n") == [lines[0], lines[2], b""]


def test_the_newest_run_of_a_recipe_and_seed_is_found(tiny: Tiny, in_tmp: Path):
    assert RunDirectory.newest("tiny", 0) is None
    for _ in range(11):
        make(tiny, None)
    RunDirectory.create(tiny("seed=1"), Source("r.yaml", ""), out=None)
    RunDirectory.create(tiny("name=tiny-3"), Source("r.yaml", ""), out=None)  # runs/tiny-3-1
    Path("runs/tiny-13").mkdir()  # barely begun
    Path("runs/tiny-x").mkdir()
    for name, seed, expected in (("tiny", 0, "tiny-11"), ("tiny", 1, "tiny-12"), ("tiny-3", 0, "tiny-3-1")):
        found = RunDirectory.newest(name, seed)
        assert found is not None and found.path == Path("runs") / expected


def test_what_a_run_left_that_was_killed_while_it_began_is_no_hindrance(tiny: Tiny, tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / "recipe.yaml").write_text("the text\n")
    (tmp_path / "resolved.yaml.partial").write_text("name: ti")
    assert make(tiny, tmp_path).begun
    (tmp_path / "resolved.yaml").unlink()
    (tmp_path / "recipe.yaml").write_text("another recipe\n")
    with pytest.raises(InputError, match="is not empty"):
        make(tiny, tmp_path)


def killed_at(moment: int) -> Callable[[RunDirectory, str, str], None]:
    """What writes so many files and no more."""
    left = iter(range(moment))

    def write(self: RunDirectory, name: str, text: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        (self.path / name).write_text(text)

    return write


def test_a_run_that_was_killed_while_it_began_has_all_files_once_it_is_begun(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = {path.name for path in make(tiny, tmp_path / "whole").path.iterdir()}
    for moment in range(len(whole)):
        run = RunDirectory(tmp_path / str(moment))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(RunDirectory, "write", killed_at(moment))
            make(tiny, run.path)
        assert len(list(run.path.iterdir())) == moment
        assert not run.begun, "it would go on without what is missing"
        assert {path.name for path in make(tiny, run.path).path.iterdir()} == whole


def test_a_run_is_reopened_with_its_own_recipe(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "run")
    run.status("interrupted")
    again, recipe = RunDirectory.reopen(run.path)
    assert (again.path, recipe) == (run.path, tiny())


def test_what_is_no_run_can_not_be_reopened(tmp_path: Path):
    with pytest.raises(InputError, match="is no run directory"):
        RunDirectory.reopen(tmp_path / "absent")


def test_a_run_at_work_says_in_which_process(tiny: Tiny, tmp_path: Path):
    run = make(tiny, tmp_path / "run")
    run.status("running")
    assert run.read_status()["process"] == this_process()
    run.status("finished")
    assert "process" not in run.read_status()


@pytest.mark.parametrize("content", [b"a: &a [x, x]\n" + b"#" * 200_000, b"\xff\xfe", b"[1]"])
def test_a_damaged_recipe_is_refused_in_a_line(tiny: Tiny, tmp_path: Path, content: bytes):
    run = make(tiny, tmp_path / "run")
    (run.path / "resolved.yaml").write_bytes(content)
    for read in (lambda: RunDirectory.reopen(run.path), lambda: run.made_from):
        with pytest.raises(InputError, match=r"resolved.yaml") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "3", "[1]"])
def test_a_damaged_status_is_refused_in_a_line(tiny: Tiny, tmp_path: Path, content: str):
    run = make(tiny, tmp_path / "run")
    (run.path / "status.json").write_text(content)
    with pytest.raises(InputError, match="status.json' can not be read .*: remove it, and the run goes on"):
        assert run.finished
