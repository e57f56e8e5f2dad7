"""Tables over several runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

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


def by_settings(groups: Mapping[str, Sequence[Run]]) -> Table:
    """A row for each setting of a sweep: mean and sample standard deviation over its finished runs.

    Arguments:
        groups: the runs that differ in their seed alone, finished or not, by what they have in common.
    """
    table = Table(box=box.SIMPLE_HEAD, title="mean ± standard deviation over seeds", title_justify="left")
    for column in ("setting", "runs", "test error", "validation error", "best epoch"):
        table.add_column(column, justify="left" if column == "setting" else "right", overflow="fold")
    for setting, runs in groups.items():
        results = [run.status["result"] for run in runs if run.status.get("result")]
        cells = [spread([result[name] for result in results]) for name in ("test_error", "validation_error")]
        epochs = ", ".join(str(result["best_epoch"]) for result in results) or "-"
        done = f"{len(results)}" if len(results) == len(runs) else f"{len(results)} of {len(runs)}"
        table.add_row(Text(setting), done, *cells, epochs)
    return table


def spread(errors: Sequence[float]) -> str:
    """Errors in percent as mean ± sample standard deviation; the one where there is one, a dash where there is none."""
    if not errors:
        return "-"
    deviation = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.fmean(errors):.2f}{deviation} %"


def _angles(run: Run) -> dict[str, float | None]:
    return run.probes[-1]["angle"] if run.probes else {}
