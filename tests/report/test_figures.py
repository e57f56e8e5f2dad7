from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fahooks.report import figures
from fahooks.report.runs import read_run

Written = Callable[..., Path]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, so that what is in it can be looked at."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        saved.append(self)
        save(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_errors_of_all_runs_and_angles_of_those_that_have_any(written: Written, tmp_path: Path, drawn: list[Figure]):
    bp = read_run(written("bp", {"conv1": 0.0, "output": 0.0}))
    fa = read_run(written("fa", {"conv1": 90.0, "dense": 70.0, "output": 0.0}))
    figures.comparison([bp, fa], tmp_path / "f.png")
    error, angle = drawn[0].axes
    assert [line.get_label() for line in error.lines] == ["bp", "fa"]
    assert np.asarray(error.lines[0].get_xdata()).tolist() == [1, 2] and np.asarray(error.lines[0].get_ydata()).tolist() == [
        30.0,
        10.0,
    ]
    assert angle.get_title() == "fa"
    curves = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in angle.lines}
    assert curves["conv1"] == [90.0, 45.0] and curves["dense"] == [70.0, 70.0]
    assert "output" not in curves
    assert imread(tmp_path / "f.png").std() > 0


def test_an_error_of_zero_can_be_drawn(written: Written, tmp_path: Path, drawn: list[Figure]):
    figures.comparison([read_run(written("bp", {"conv1": 0.0}, errors=(5.0, 0.0)))], tmp_path / "f.png")
    assert len(drawn[0].axes) == 1
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_an_angle_that_could_not_be_measured_is_a_gap(written: Written, tmp_path: Path, drawn: list[Figure]):
    figures.comparison([read_run(written("fa", {"conv1": 90.0, "dense": None}))], tmp_path / "f.png")
    assert {str(line.get_label()) for line in drawn[0].axes[1].lines} >= {"conv1", "dense"}
