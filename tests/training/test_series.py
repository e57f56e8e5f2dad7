from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from fahooks.plugins import InputError
from fahooks.recipe import find, load
from fahooks.training import loop
from fahooks.training.series import Wanted, carry_out, goes_on_by_itself


def wanted(path: Path, *overrides: str) -> Wanted:
    return Wanted(path, load("mnist/fa", overrides), find("mnist/fa"), overrides, "a setting")


def test_data_that_are_not_at_hand_come_with_advice(tmp_path: Path):
    run = wanted(tmp_path / "seed-0", f"data.root={tmp_path}", "data.download=false")
    with pytest.raises(InputError, match="mnist is not at .*; or take seed 0$"):
        carry_out([run], tmp_path, advice=lambda runs: f"take seed {runs[0].recipe.seed}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can not be written"):
        carry_out([wanted(tmp_path / "file" / "seed-0")], tmp_path / "file")


def test_a_run_is_called_by_recipe_setting_and_seed(tmp_path: Path):
    assert wanted(tmp_path, "seed=3").name == "mnist/fa, a setting, seed 3"


def test_a_stop_says_how_to_go_on():
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"), goes_on_by_itself():
        raise KeyboardInterrupt


@pytest.mark.parametrize("asked", [True, False])
def test_who_asks_to_stop_when_a_run_is_as_good_as_over_stops_the_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
):
    small = (
        "train.epochs=1",
        "data.dataset=digits",
        "data.limit=60",
        "data.validation=20",
        "train.device=cpu",
        "probes.every=null",
    )
    runs = [wanted(tmp_path / f"seed-{seed}", *small, f"seed={seed}") for seed in (0, 1)]
    monkeypatch.setattr(loop, "_plot", lambda run: os.kill(os.getpid(), signal.SIGTERM) if asked else None)
    with pytest.raises(KeyboardInterrupt) if asked else nullcontext():
        carry_out(runs, tmp_path)
    assert [run.finished for run in runs] == [True, not asked]
