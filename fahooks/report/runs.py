"""Run directories, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fahooks.plugins import InputError
from fahooks.recipe import read_plain
from fahooks.report.liveness import state


@dataclass(frozen=True)
class Run:
    """What one run directory says.

    Attributes:
        path: the directory.
        recipe: resolved.yaml.
        status: status.json; its state is "killed" where it says that a process is at work that is gone.
        epochs: one row an epoch, as in metrics.jsonl.
        probes: one row a measurement.
    """

    path: Path
    recipe: dict[str, Any]
    status: dict[str, Any]
    epochs: list[dict[str, Any]]
    probes: list[dict[str, Any]]

    @property
    def rules(self) -> str:
        """The feedback rules, in the order of the recipe."""
        return ", ".join(dict.fromkeys(entry["rule"] for entry in self.recipe["feedback"]))


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is none, or a file in it is damaged.
    """
    for name in ("resolved.yaml", "status.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise InputError(f"{str(path)!r} is no run directory: it has no {name}")
    try:
        recipe = read_plain(path / "resolved.yaml")
        status = dict(json.loads((path / "status.json").read_text(encoding="utf-8")))
        # What follows the last newline was cut off by a crash.
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"run directory {str(path)!r} can not be read: {' '.join(str(error).split())}") from error
    return Run(
        path=path,
        recipe=recipe,
        status={**status, "state": state(path, status)},
        epochs=[row for row in rows if row["kind"] == "epoch"],
        probes=[row for row in rows if row["kind"] == "probe"],
    )
