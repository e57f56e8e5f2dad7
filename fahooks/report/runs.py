"""Run directories, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fahooks.plugins import InputError


@dataclass(frozen=True)
class Run:
    """What one run directory says.

    Attributes:
        path: the directory.
        recipe: resolved.yaml.
        status: status.json.
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
    try:
        recipe = yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8"))
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
        # What follows the last newline was cut off by a crash.
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise InputError(f"{str(path)!r} is no run directory: it has no {Path(error.filename).name}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"run directory {str(path)!r} can not be read: {' '.join(str(error).split())}") from error
    return Run(
        path=path,
        recipe=recipe,
        status=status,
        epochs=[row for row in rows if row["kind"] == "epoch"],
        probes=[row for row in rows if row["kind"] == "probe"],
    )
