"""Reading: YAML with line marks, `base:` and overrides, merged into one tree. Nothing is checked against the schema here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import yaml

from fahooks.plugins import InputError, near
from fahooks.recipe.tree import ABSENT, Key, Tree, child_of, dotted, shown


@dataclass(frozen=True)
class Source:
    """The text of a recipe and where it came from.

    Arguments:
        label: the file, as messages name it.
        text: what it says.
        folder: what a `base:` in it is relative to; None for the current folder.
    """

    label: str
    text: str
    folder: Path | None = None


def find_beside(name: str, beside: Path | None) -> Source:
    """The recipe that `name` stands for: a file, sought in the folder `beside` where one is given, or a shipped recipe.

    Raises:
        InputError: neither, or the file can not be read.
    """
    path = Path(os.path.expanduser(name))
    path = path if beside is None else beside / path
    shipped = name.removesuffix(".yaml")
    if os.path.isfile(path):
        try:
            return Source(str(path), path.read_text(encoding="utf-8"), path.parent)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {str(path)!r} can not be read: {error}") from error
    package = resources.files("fahooks.recipes")
    known = list(all_names(package, ""))
    if shipped in known:
        file = package.joinpath(*f"{shipped}.yaml".split("/"))
        return Source(str(file), file.read_text(encoding="utf-8"), Path(str(package)))
    hint = near(shipped, [k for k in known if not k.startswith("_")])
    raise InputError(f"no recipe is named {name!r}, and there is no such file{hint}; `fahooks ls recipes` lists all")


def all_names(folder: Traversable, prefix: str) -> Iterator[str]:
    """The names of all recipes below `folder`, those of bases too, each after `prefix`."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from all_names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as the number that it is (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


MAX_NODES = 10_000


class Reader:
    """Turns YAML text into plain data with the line of every key."""

    def __init__(self, tree: Tree, label: str | None, where: str = "") -> None:
        self.tree = tree
        self.label = label
        self.where = where
        self.nodes = 0

    def read(self, text: str, at: Key = ()) -> Any:
        """The data of `text`, whose root stands at `at`; `ABSENT` where it can not be read."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._convert(loader, node, at)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self._problem(line, at, f"not YAML: {error.problem or error.context}")
        except yaml.YAMLError as error:
            self._problem(1, at, f"not YAML: {' '.join(str(error).split())}")
        except RecursionError:
            self._problem(1, at, "nested too deeply")
        return ABSENT

    def _convert(self, loader: _Loader, node: yaml.Node, at: Key) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values")
        line = node.start_mark.line + 1
        self.tree.marks.setdefault(at, self._place(line))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(loader, node, at)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._convert(loader, child, (*at, i)) for i, child in enumerate(node.value)]
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = getattr(error, "problem", None) or str(error)
            self._problem(line, at, f"can not be read: {reason}")
            return None

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, at: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self._problem(line, at, "a key must be a word")
            elif key in lines:
                self._problem(line, (*at, key), f"given twice, first in line {lines[key]}")
            else:
                lines[key] = line
                self.tree.marks[*at, key] = self._place(line)
                result[key] = self._convert(loader, value_node, (*at, key))
        return result

    def _place(self, line: int) -> str:
        return f"{self.label}:{line}" if self.label else self.where

    def _problem(self, line: int, at: Key, what: str) -> None:
        self.tree.problem(at, what, where=self._place(line))


def add_file(tree: Tree, source: Source, above: tuple[str, ...]) -> None:
    """Merge `source`, after its bases, into `tree`."""
    own = Tree()
    own.marks[()] = f"{source.label}:1"
    data = Reader(own, source.label).read(source.text)
    if data is None or (data is not ABSENT and not isinstance(data, dict)):
        own.problem((), "a recipe is a mapping of keys to values" + ("" if data is None else f" (got {shown(data)})"))
    if isinstance(data, dict):
        base = data.pop("base", None)
        if base is not None:
            _add_base(tree, own, base, source, above)
        _merge(tree, (), data, own.marks)
    tree.marks[()] = own.marks[()]
    tree.problems += own.problems


def _add_base(tree: Tree, own: Tree, base: Any, source: Source, above: tuple[str, ...]) -> None:
    where = own.marks["base",]
    if not isinstance(base, str):
        own.problem(("base",), f"must be the name of one recipe (got {shown(base)})", where)
        return
    try:
        parent = find_beside(base, beside=source.folder)
    except InputError as error:
        own.problem(("base",), str(error), where)
        return
    chain = (*above, source.label)
    if any(Path(parent.label).resolve() == Path(label).resolve() for label in chain):
        own.problem(("base",), f"recipes that are based on each other: {' -> '.join((*chain, parent.label))}", where)
        return
    add_file(tree, parent, chain)


def _merge(tree: Tree, at: Key, data: dict[str, Any], marks: Mapping[Key, str]) -> None:
    """Write `data` over the mapping at `at`: mappings merge, everything else replaces."""
    target = tree.data
    for part in at:
        target = target[part]
    for name, value in data.items():
        key = (*at, name)
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(tree, key, value, marks)
            continue
        for old in [k for k in tree.marks if k[: len(key)] == key]:
            del tree.marks[old]
        tree.marks.update({k: m for k, m in marks.items() if k[: len(key)] == key})
        target[name] = value


def add_override(tree: Tree, override: str) -> None:
    """Set one dotted key."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        tree.problem((), f"must be dotted.key=value, such as train.epochs=1 (got {override!r})", where="--set")
        return
    key = _parsed_key(tree, name)
    own = Tree()
    value = Reader(own, None, "--set").read(text, key)
    tree.problems += own.problems
    if value is ABSENT:
        return
    if key[0] == "base":
        tree.problem(key, "can only be given in a file", where="--set")
        return
    _set(tree, key, value, own.marks)


def _parsed_key(tree: Tree, name: str) -> Key:
    """The parts of a dotted key; a number is the place in a list where there is a list."""
    key: Key = ()
    for part in name.split("."):
        key = (*key, int(part) if part.isdecimal() and isinstance(tree.get(key), list) else part)
    return key


def _set(tree: Tree, key: Key, value: Any, marks: Mapping[Key, str]) -> None:
    target = tree.data
    for depth, part in enumerate(key[:-1]):
        if isinstance(target, dict) and target.get(part) is None:
            tree.marks[key[: depth + 1]] = "--set"
            target[part] = {}
        target = child_of(target, part)
    last = key[-1]
    if isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
        for old in [k for k in tree.marks if k[: len(key)] == key]:
            del tree.marks[old]
        tree.marks |= marks
        tree.marks[key] = "--set"
        cast(Any, target)[last] = value
    else:
        tree.problem(key, f"there is no such key, since {dotted(key[:-1])} is {shown(tree.get(key[:-1]))}", where="--set")
