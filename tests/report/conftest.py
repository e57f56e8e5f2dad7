from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a run directory by hand: rule, angles by layer, and the errors of its epochs."""

    def write(rule: str, angles: dict[str, float | None], errors: tuple[float, ...] = (30.0, 10.0), **status: Any) -> Path:
        path = tmp_path / rule
        path.mkdir()
        (path / "resolved.yaml").write_text(f"feedback:\n- {{match: output, rule: {rule}}}\n- {{match: '*', rule: {rule}}}\n")
        (path / "status.json").write_text(json.dumps({"state": "finished", **status}))
        rows: list[dict[str, Any]] = []
        for epoch, error in enumerate(errors, start=1):
            rows.append({"kind": "probe", "step": 10 * epoch, "angle": {**angles, "conv1": angles["conv1"] and 90.0 / epoch}})
            rows.append({"kind": "epoch", "epoch": epoch, "validation_error": error, "seconds": 2.0 * epoch})
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "epo')
        return path

    return write
