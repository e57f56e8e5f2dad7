"""What was read of a recipe so far: plain data, the place where each key was written, and the problems met."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Key = tuple[str | int, ...]


@dataclass
class Tree:
    """What was read so far: plain data, where each key was written, and the problems met."""

    data: Any = field(default_factory=dict)
    marks: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def mark(self, key: Key) -> str:
        """Where `key`, or the closest section around it, was written."""
        while key and key not in self.marks:
            key = key[:-1]
        return self.marks.get(key, "recipe")

    def get(self, key: Key) -> Any:
        """The value at `key`; None where there is none."""
        value = self.data
        for part in key:
            value = child_of(value, part)
        return None if value is ABSENT else value

    def problem(self, key: Key, what: str, where: str | None = None) -> None:
        """Note that `what` is wrong at `key`."""
        named = f"{dotted(key)}: " if key else ""
        self.problems.append(f"{where or self.mark(key)}: {named}{what}")


ABSENT = object()


def child_of(value: Any, part: str | int) -> Any:
    """What a mapping has under a key, or a list at an index; `ABSENT` where there is nothing."""
    if isinstance(value, dict):
        return value.get(part, ABSENT)
    if isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
        return value[part]
    return ABSENT


def dotted(key: Key) -> str:
    """A key as users write it: data.batch_size."""
    return ".".join(map(str, key))


def shown(value: Any) -> str:
    """A value for a message, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
