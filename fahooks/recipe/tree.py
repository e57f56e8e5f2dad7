"""What was read of a recipe so far: plain data, the place where each key was written, and the problems met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fahooks.plugins import escaped

Key = tuple[str | int, ...]

# A line about a problem may quote what a stranger wrote.
LINE = 1000
SHOWN = 60


@dataclass
class Tree:
    """What was read so far: plain data, where each key was written, and the problems met.

    Attributes:
        data: mappings, lists and scalars.
        marks: file:line of a key, or the option of the command line that set it.
        problems: a line each.
        faulty: the keys that they are about.
        whole: False once a file could not be read: what is missing then may be in it.
        renamed: what a section named before another name, whose options these are not, took its place.
    """

    data: Any = field(default_factory=dict)
    marks: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    faulty: set[Key] = field(default_factory=set)
    whole: bool = True
    renamed: dict[Key, Any] = field(default_factory=dict)

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

    def add_problems(self, other: Tree) -> None:
        """Note those of `other` here too."""
        self.problems += other.problems
        self.faulty |= other.faulty

    def problem(self, key: Key, what: str, where: str | None = None) -> None:
        """Note that `what` is wrong at `key`, in one line of characters that can be printed."""
        self.faulty.add(key)
        named = f"{dotted(key)}: " if key else ""
        self.problems.append(printable(f"{where or self.mark(key)}: {named}{what}"))


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
    return ".".join(part if len(part) <= SHOWN else f"{part[: SHOWN - 3]}..." for part in map(str, key))


def printable(text: str) -> str:
    """`text` as one line, with escapes for what can not be printed, shortened to 1,000 characters."""
    text = escaped(text if len(text) <= LINE else f"{text[: LINE - 3]}...")
    return text if len(text) <= LINE else f"{text[: LINE - 3]}..."


def shown(value: Any) -> str:
    """A value for a message, shortened to 60 characters; no more of it is looked at than is shown."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > SHOWN:
            return f"{text[: SHOWN - 3]}..."
    return text


def _pieces(value: Any) -> Iterator[str]:
    """The parts of `value` as YAML, one after the other."""
    if isinstance(value, dict):
        yield "{"
        for place, (key, child) in enumerate(value.items()):
            yield ", " if place else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(child)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for place, child in enumerate(value):
            yield ", " if place else ""
            yield from _pieces(child)
        yield "]"
    elif value is None or isinstance(value, bool):
        yield "null" if value is None else str(value).lower()
    else:
        yield repr(value[: SHOWN + 1] if isinstance(value, str) else value)
