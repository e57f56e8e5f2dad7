"""Reading: YAML with line marks, `base:` and overrides, merged into one tree. Nothing is checked against the schema here."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import yaml

from fahooks.plugins import InputError, near
from fahooks.recipe.tree import ABSENT, Key, Tree, child_of, dotted, shown

# What a recipe may cost to read, whoever wrote it. The largest that ships has 700 bytes, 40 values, and one base.
MAX_BYTES = 100_000
MAX_VALUES = 5_000
MAX_DEPTH = 20
MAX_DIGITS = 100
MAX_BASES = 10

LISTS = (("feedback",), ("hooks",), ("data", "augment"))

# How messages name the files of the package, wherever it is installed.
SHIPPED = "fahooks/recipes"


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
    package = resources.files("fahooks.recipes")
    if os.path.isfile(path):
        source = read_file(path)
        inside = path.is_relative_to(str(package))
        return replace(source, label=f"{SHIPPED}/{path.relative_to(str(package))}") if inside else source
    known = list(all_names(package, ""))
    if shipped in known:
        file = package.joinpath(*f"{shipped}.yaml".split("/"))
        return Source(f"{SHIPPED}/{shipped}.yaml", file.read_text(encoding="utf-8"), Path(str(package)))
    hint = near(shipped, [k for k in known if not k.startswith("_")])
    file = "no such file" if not os.path.exists(path) else "a folder of that name, but no file"
    file = file if os.path.isdir(path) or not os.path.exists(path) else "something of that name that is no regular file"
    if os.path.isfile(path / "resolved.yaml"):
        raise InputError(
            f"{shown(name)} is a run directory: `fahooks train --resume {name}` goes on with it unless it is finished, and "
            f"{path / 'resolved.yaml'} is its recipe"
        )
    raise InputError(f"no recipe is named {shown(name)}, and there is {file}{hint}; `fahooks ls recipes` lists all")


def read_file(path: Path) -> Source:
    """The recipe in a regular file; nothing else is opened, since a device or a pipe may never end.

    Raises:
        InputError: it can not be read, is too large, or is no text.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_BYTES + 1) if regular else b""
        if not regular:
            raise InputError(f"recipe {str(path)!r} can not be read: it is no regular file")
        if len(content) > MAX_BYTES:
            raise InputError(f"recipe {str(path)!r} can not be read: it has more than {MAX_BYTES:,} bytes")
        return Source(str(path), content.decode(), path.parent)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"recipe {str(path)!r} can not be read: {reason}") from error


def all_names(folder: Traversable, prefix: str) -> Iterator[str]:
    """The names of all recipes below `folder`, those of bases too, each after `prefix`."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from all_names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


class _TooMuch(Exception):
    """What no recipe needs, and costs too much to read."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as the number that it is (YAML 1.1 wants 1.0e-4), and gives up on deep nesting early."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begin a list or mapping; PyYAML's time for a bracket grows with those that are open."""
        if self.flow_level > MAX_DEPTH:
            raise _TooMuch(f"more than {MAX_DEPTH} levels")
        super().fetch_flow_collection_start(TokenClass)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)

STANDARD = "tag:yaml.org,2002:"
NUMBERS = (f"{STANDARD}int", f"{STANDARD}float")
WORDS = (f"{STANDARD}str", f"{STANDARD}timestamp")  # no key is a time, and a name may look like one
SCALARS = (*NUMBERS, *WORDS, f"{STANDARD}bool", f"{STANDARD}null")

# Control characters but for tab and line ends, and halves of UTF-16 pairs: no name, path or sentence has them.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Reader:
    """Turns YAML text into plain data with the line of every key.

    Plain means: mappings with words as keys, lists, and YAML's scalars. Any other tag is refused, so nothing is ever constructed.
    """

    def __init__(self, tree: Tree, label: str | None, where: str = "") -> None:
        self.tree = tree
        self.label = label
        self.where = where
        self.values = 0

    def read(self, text: str, at: Key = ()) -> Any:
        """The data of `text`, whose root stands at `at`; `ABSENT` where it can not be read."""
        try:
            if len(text) > MAX_BYTES:
                raise _TooMuch(f"more than {MAX_BYTES:,} characters")
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._convert(loader, node, at)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self._problem(line, at, f"not YAML: {error.problem or error.context}")
        except yaml.YAMLError as error:
            self._problem(1, at, f"not YAML: {' '.join(str(error).split())}")
        except _TooMuch as error:
            self._problem(1, at, f"too much for a recipe: {error}")
        except RecursionError:
            self._problem(1, at, f"too much for a recipe: more than {MAX_DEPTH} levels")
        return ABSENT

    def _convert(self, loader: _Loader, node: yaml.Node, at: Key) -> Any:
        # Counted here and not where the text is parsed: an alias stands for all that it refers to.
        self.values += 1
        if self.values > MAX_VALUES:
            raise _TooMuch(f"more than {MAX_VALUES:,} values")
        if len(at) > MAX_DEPTH:
            raise _TooMuch(f"more than {MAX_DEPTH} levels")
        line = node.start_mark.line + 1
        self.tree.marks.setdefault(at, self._place(line))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{STANDARD}map":
            return self._mapping(loader, node, at)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{STANDARD}seq":
            return [self._convert(loader, child, (*at, i)) for i, child in enumerate(node.value)]
        try:
            return _scalar(loader, node)
        except ValueError as error:
            self._problem(line, at, f"can not be read: {error}")
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


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    """The value of a single word.

    Raises:
        ValueError: it is none, or its tag is not of plain YAML, or does not fit.
    """
    if not isinstance(node, yaml.ScalarNode) or node.tag not in SCALARS:
        raise ValueError(f"a recipe has no values with the tag {node.tag!r}")
    text = node.value
    if node.tag in NUMBERS and len(text) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    if node.tag in WORDS:
        if found := UNPRINTABLE.search(text):
            raise ValueError(f"a character that can not be printed, {found[0]!r}")
        return text
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, LookupError, ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is no {node.tag.removeprefix(STANDARD)}") from error
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{text} does not fit into 64 bits")
    return value


def add_file(tree: Tree, source: Source, above: tuple[str, ...]) -> None:
    """Merge `source`, after its bases, into `tree`; where one of them can not be read, `tree` is not whole."""
    own = Tree()
    own.marks[()] = f"{source.label}:1"
    data = Reader(own, source.label).read(source.text)
    tree.whole = tree.whole and isinstance(data, dict)
    if data is None or (data is not ABSENT and not isinstance(data, dict)):
        own.problem((), "a recipe is a mapping of keys to values" + ("" if data is None else f" (got {shown(data)})"))
    if isinstance(data, dict):
        base = data.pop("base", None)
        if base is not None:
            _add_base(tree, own, base, source, above)
        elif ("base",) in own.marks and own.problems:
            tree.whole = False
        _merge(tree, data, own.marks)
    tree.marks[()] = own.marks[()]
    tree.add_problems(own)


def _add_base(tree: Tree, own: Tree, base: Any, source: Source, above: tuple[str, ...]) -> None:
    chain = (*above, source.label)
    try:
        if not isinstance(base, str):
            raise InputError(f"must be the name of one recipe (got {shown(base)})")
        parent = find_beside(base, beside=source.folder)
        if any(Path(parent.label).resolve() == Path(label).resolve() for label in chain):
            raise InputError(f"recipes that are based on each other: {' -> '.join((*chain, parent.label))}")
        if len(chain) > MAX_BASES:
            raise InputError(f"too much for a recipe: more than {MAX_BASES} bases, one of the other")
    except InputError as error:
        own.problem(("base",), str(error), own.marks["base",])
        tree.whole = False
    else:
        add_file(tree, parent, chain)


def _merge(tree: Tree, data: dict[str, Any], marks: Mapping[Key, str]) -> None:
    """Write `data` over the tree: mappings merge, save those that name another thing; everything else replaces."""
    replaced: set[Key] = set()
    _overlay(tree, tree.data, data, (), replaced)

    def of_replaced(key: Key) -> bool:
        return any(key[:length] in replaced for length in range(1, len(key) + 1))

    kept = {key: mark for key, mark in tree.marks.items() if not of_replaced(key)}
    tree.marks = kept | {key: mark for key, mark in marks.items() if of_replaced(key)}


def _overlay(tree: Tree, target: dict[str, Any], data: dict[str, Any], at: Key, replaced: set[Key]) -> None:
    for name in ("dataset", "loader") if at == ("data",) else ():
        if _names_another(data, target, name) and target.pop(f"{name}_options", None):
            tree.renamed[*at, f"{name}_options"] = target[name]
            replaced.add((*at, f"{name}_options"))
    for name, value in data.items():
        below = target.get(name)
        if isinstance(value, dict) and isinstance(below, dict) and not _names_another(value, below):
            _overlay(tree, below, value, (*at, name), replaced)
        else:
            if isinstance(value, dict) and isinstance(below, dict):
                tree.renamed[*at, name] = below["name"]
            target[name] = value
            replaced.add((*at, name))


def _names_another(section: Mapping[Any, Any], below: Mapping[Any, Any], by: str = "name") -> bool:
    """Whether a section, such as model or optim, names another thing than the one `below`, whose options are not its own."""
    return by in section and by in below and section[by] != below[by]


def _options_of(key: Key) -> tuple[Key, set[str]] | None:
    """The section with the options of what `key` names, and the keys there that are no options; None where it names nothing."""
    match key:
        case (str(), "name"):
            return key[:1], {"name"}
        case ("hooks", int(), "name") | ("feedback", int(), "rule"):
            return key[:2], {"match", str(key[2])}
        case ("data", "dataset" | "loader"):
            return ("data", f"{key[1]}_options"), set()
    return None


def add_override(tree: Tree, override: str, option: str = "--set") -> None:
    """Set one dotted key, as `option` of the command line says."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        tree.problem((), f"must be dotted.key=value, such as train.epochs=1 (got {shown(override)})", where=option)
        return
    key = _parsed_key(tree, name)
    if len(key) > MAX_DEPTH:
        tree.problem((), f"too much for a recipe: more than {MAX_DEPTH} levels (got {shown(override)})", where=option)
        return
    own = Tree()
    value = Reader(own, None, option).read(text, key)
    tree.add_problems(own)
    if value is ABSENT:
        return
    if key[0] == "base":
        tree.problem(key, "can only be given in a file", where=option)
        return
    _set(tree, key, value, own.marks, option)


def _parsed_key(tree: Tree, name: str) -> Key:
    """The parts of a dotted key; a number is the place in a list where there is a list."""
    key: Key = ()
    for part in name.split("."):
        in_list = isinstance(tree.get(key), list) and part.isdecimal() and len(part) <= MAX_DIGITS
        key = (*key, int(part) if in_list else part)
    return key


def _set(tree: Tree, key: Key, value: Any, marks: Mapping[Key, str], option: str) -> None:
    target = tree.data
    for depth, part in enumerate(key):
        if isinstance(target, list) and child_of(target, part) is ABSENT:
            example = dotted((*key[:depth], 0, *key[depth + isinstance(part, int) :]))
            has = f"has the entries 0 to {len(target) - 1}, as in {example}" if target else "is empty"
            tree.problem(key, f"there is no such key, since {dotted(key[:depth])} {has}", where=option)
            return
        if depth == len(key) - 1:
            break
        if isinstance(target, dict) and target.get(part) is None:
            if key[: depth + 1] in LISTS and str(key[depth + 1]).isdecimal():
                tree.problem(key, f"there is no such key, since {dotted(key[: depth + 1])} is empty", where=option)
                return
            tree.marks[key[: depth + 1]] = option
            target[part] = {}
        target = child_of(target, part)
    last = key[-1]
    if isinstance(target, dict | list):
        options = _options_of(key)
        if options is not None and isinstance(target, dict) and _names_another({last: value}, target, str(last)):
            _drop_options(tree, *options, named=target[str(last)], where=option)
        for old in [k for k in tree.marks if k[: len(key)] == key]:
            del tree.marks[old]
        tree.marks |= marks
        tree.marks[key] = option
        cast(Any, target)[last] = value
    else:
        tree.problem(key, f"there is no such key, since {dotted(key[:-1])} is {shown(tree.get(key[:-1]))}", where=option)


def _drop_options(tree: Tree, section: Key, others: set[str], *, named: Any, where: str) -> None:
    """Take the options of what a section `named` out of it, save those that the command line has set, and what is no option."""
    options = tree.get(section)
    if not isinstance(options, dict):
        return
    tree.renamed[section] = named
    for name in [name for name in options if name not in others and not tree.mark((*section, name)).startswith("--")]:
        del options[name]
        for old in [key for key in tree.marks if key[: len(section) + 1] == (*section, name)]:
            del tree.marks[old]
    tree.marks[section] = where
