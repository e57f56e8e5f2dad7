"""Figures over several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fahooks.report.runs import Run


def comparison(runs: Sequence[Run], path: Path) -> None:
    """Draw validation error over epochs for all runs, and beside it, a panel a run, each layer's angle over steps.

    Runs whose angles are zero throughout, which is backprop, have no panel.

    Arguments:
        runs: what to draw.
        path: the file to write; its ending chooses the format.
    """
    turned = [run for run in runs if any(angle for row in run.probes for angle in row["angle"].values())]
    panels = 1 + len(turned)
    figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    _errors(first, runs)
    for axes, run in zip(others, turned, strict=True):
        _angles(axes, run)
    figure.savefig(path, dpi=150)


def _errors(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        axes.plot([r["epoch"] for r in run.epochs], [r["validation_error"] for r in run.epochs], label=run.rules)
    if all(row["validation_error"] > 0 for run in runs for row in run.epochs):
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="validation error (%)", title="error")
    axes.legend()


def _angles(axes: Axes, run: Run) -> None:
    """Angle over steps; every rule sends the last layer its true gradient, so a layer that stays at zero is left out."""
    for layer in run.probes[0]["angle"]:
        angles = [math.nan if (angle := row["angle"].get(layer)) is None else angle for row in run.probes]
        if any(angles):
            axes.plot([row["step"] for row in run.probes], angles, label=layer)
    axes.axhline(90, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="angle to the true gradient (degrees)", title=run.rules, ylim=(0, 120))
    axes.legend()
