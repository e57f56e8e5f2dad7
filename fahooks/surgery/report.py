"""What was done: the report of a conversion, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXCLUDED = "excluded"

NOT_INCLUDED = "not included"

NO_PATTERN = "no pattern matches"

LEFT_BY_BP = "rule bp: left as it is"

BETWEEN_BLOCKS = "backpropagation: the error is sent to the outputs of blocks"

LEFT_AS_ASKED = frozenset({LEFT_BY_BP, NO_PATTERN, EXCLUDED, NOT_INCLUDED, BETWEEN_BLOCKS})


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: qualified name; for one of several weights of a module, with the parameter's name.
        type: the plain class's name.
        weight_shape: shape of W.
        rule: the rule as printed, empty where not converted.
        memory_bytes: what the rule's state adds.
        reason: why it was not converted; None if it was.
        grows: whether the rule's state takes more memory later; printed as a plus.
    """

    name: str
    type: str
    weight_shape: tuple[int, ...]
    rule: str
    memory_bytes: int
    reason: str | None = None
    grows: bool = False

    @property
    def outcome(self) -> str:
        """What became of it, as printed."""
        if self.reason is None:
            return "converted" if self.weight_shape else "converted, at its output"
        return self.reason if self.reason == BETWEEN_BLOCKS else f"skipped: {self.reason}"

    @property
    def memory(self) -> str:
        """The bytes as printed."""
        return f"{self.memory_bytes}{'+' if self.grows else ''}"


@dataclass(frozen=True)
class Report:
    """What `convert` did, layer by layer; prints as a table.

    Attributes:
        layers: a line each.
        notes: what a user of the rules should know.
    """

    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[str]:
        """Names of the converted layers, in model order."""
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """Why each other layer was not converted, by name."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    @property
    def left_out(self) -> list[str]:
        """Names of the layers that were left to backpropagation as asked; by `exclude`, also those that no rule could serve."""
        return [layer.name for layer in self.layers if layer.reason in LEFT_AS_ASKED]

    @property
    def memory_bytes(self) -> int:
        """Bytes that the rules' state adds to the model."""
        return sum(layer.memory_bytes for layer in self.layers)

    @property
    def total(self) -> str:
        """The last line of the table."""
        blocks = [layer for layer in self.layers if layer.reason is None and not layer.weight_shape]
        inside = sum(layer.reason == BETWEEN_BLOCKS for layer in self.layers)
        if blocks:
            layers = len(self.converted) - len(blocks)
            noun = "block" if len(blocks) == 1 else "blocks"
            parts = [f"{len(blocks)} {noun} converted, {inside} layers in and between them by backpropagation"]
            parts += [f"{layers} more {'layer' if layers == 1 else 'layers'} converted"] if layers else []
            return ", ".join([*parts, f"{len(self.skipped) - inside} skipped, {self._memory} bytes added"])
        layers = "layer" if len(self.converted) == 1 else "layers"
        return f"{len(self.converted)} {layers} converted, {len(self.skipped)} skipped, {self._memory} bytes added"

    @property
    def _memory(self) -> str:
        return f"{self.memory_bytes:,}{'+' if any(layer.grows for layer in self.layers) else ''}"

    def as_dict(self) -> dict[str, Any]:
        """The report in types that json can write."""
        return {"layers": [vars(layer) for layer in self.layers], "memory_bytes": self.memory_bytes, "notes": self.notes}

    def __str__(self) -> str:
        header = ("layer", "type", "weight", "rule", "bytes added", "")
        rows = [header] + [
            (
                layer.name or "(model)",
                layer.type,
                "x".join(map(str, layer.weight_shape)),
                layer.rule,
                layer.memory,
                layer.outcome,
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.total, *self.notes])
