"""Tables over several runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from fahooks.report.runs import Run


def comparison(runs: Sequence[Run]) -> Table:
    """A row a run: rules, test error, best epoch, and the angle of each layer's learning signal when it was last measured.

    Arguments:
        runs: finished or not; what a run does not have yet shows as a dash.
    """
    layers = list(dict.fromkeys(layer for run in runs for layer in _angles(run)))
    table = Table(
        box=box.SIMPLE_HEAD, title="angle = between a layer's learning signal and the true gradient", title_justify="left"
    )
    table.add_column("rule")
    table.add_column("test error", justify="right")
    table.add_column("best epoch", justify="right")
    for layer in layers:
        table.add_column(f"angle {layer}", justify="right")
    table.add_column("time", justify="right")
    for run in runs:
        result = run.status.get("result", {})
        angles = _angles(run)
        table.add_row(
            run.rules,
            f"{result['test_error']:.2f} %" if result else "-",
            str(result["best_epoch"]) if result else "-",
            *("-" if angles.get(layer) is None else f"{angles[layer]:.1f}°" for layer in layers),
            f"{run.epochs[-1]['seconds']:.0f} s" if run.epochs else "-",
        )
    return table


def _angles(run: Run) -> dict[str, float | None]:
    return run.probes[-1]["angle"] if run.probes else {}
