"""Recipes: one YAML file is one run. The schema, reading with line marks, `base:` and `--set`, and every error at once.

Whatever is wrong is reported together, each as `file:line: dotted.key: what is wrong (got ...) - did you mean ...?`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from fahooks import models, plugins
from fahooks.data.datasets import default_root
from fahooks.plugins import InputError, near


class RecipeError(InputError):
    """A recipe is wrong: the message has one line for each problem.

    Arguments:
        problems: the lines.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Section(BaseModel):
    """A mapping in a recipe: fixed keys, strict types, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OpenSection(Section):
    """A section with the options of a registered thing beside its own keys."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The options, as given."""
        return dict(self.model_extra or {})


Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]


class Model(OpenSection):
    """The network: a registered name, timm/NAME or torchvision/NAME, with its options."""

    name: str


class Feedback(OpenSection):
    """Which rule sends the error back through which layers, with the rule's options."""

    match: str = "*"
    rule: str


class Data(Section):
    """What to train on.

    Arguments:
        dataset: a registered dataset.
        root: the folder that holds datasets on disk.
        download: fetch missing files.
        loader: a registered loader, or "auto".
        batch_size: images a step.
        validation: how many training images choose the best epoch: a number, or a fraction.
        limit: use at most this many training images, validation included.
    """

    dataset: str
    root: str = Field(default_factory=default_root)
    download: bool = True
    loader: str = "auto"
    batch_size: Count
    validation: Count | Fraction
    limit: Count | None = None


class Adam(Section):
    """Adam (Kingma, Ba 2014); weight decay is an L2 term in the gradient."""

    name: Literal["adam"]
    lr: Positive
    weight_decay: NonNegative = 0.0
    betas: Betas = (0.9, 0.999)


class AdamW(Section):
    """AdamW (Loshchilov, Hutter 2019); weight decay shrinks the weights directly."""

    name: Literal["adamw"]
    lr: Positive
    weight_decay: NonNegative = 0.01
    betas: Betas = (0.9, 0.999)


class SGD(Section):
    """Stochastic gradient descent; weight decay is an L2 term in the gradient."""

    name: Literal["sgd"]
    lr: Positive
    weight_decay: NonNegative = 0.0
    momentum: NonNegative = 0.0
    nesterov: bool = False


class Constant(Section):
    """The learning rate stays."""

    name: Literal["constant"] = "constant"


class Step(Section):
    """The learning rate is multiplied by `gamma` after every `every` epochs."""

    name: Literal["step"]
    every: Count
    gamma: Positive


class Cosine(Section):
    """The learning rate falls to zero along half a cosine."""

    name: Literal["cosine"]


class Train(Section):
    """How to train.

    Arguments:
        epochs: passes over the training images.
        precision: "fp32", or "bf16" for autocast to bfloat16.
        channels_last: that memory format for model and images.
        compile: run the model through torch.compile.
        device: "auto" takes the first GPU where there is one.
        threads: CPU threads for torch; None leaves them alone.
    """

    epochs: Count
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None


class Probes(Section):
    """Measurements of the learning signals: every how many steps, None for never."""

    every: Count | None = None


class Paper(Section):
    """The published number that the recipe reproduces: test error in percent."""

    table: int
    row: str
    column: str
    error: NonNegative


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
    summary: str = ""
    paper: Paper | None = None
    model: Model
    feedback: Annotated[list[Feedback], Field(min_length=1)]
    data: Data
    optim: Annotated[Adam | AdamW | SGD, Field(discriminator="name")]
    schedule: Annotated[Constant | Step | Cosine, Field(discriminator="name")] = Constant()
    train: Train
    probes: Probes = Probes()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def as_yaml(self) -> str:
        """The recipe with every default written out: running it again is the same run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=130)


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


@dataclass(frozen=True)
class Shipped:
    """A row of `fahooks ls recipes`."""

    name: str
    summary: str
    paper: str


def find(name: str) -> Source:
    """The recipe that `name` stands for: a file, or a shipped recipe such as mnist/fa.

    Raises:
        InputError: neither, or the file can not be read.
    """
    return _find(name, beside=None)


def load(source: Source | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its bases and `overrides`, and check all of it.

    Arguments:
        source: what `find` returned, or a name for it.
        overrides: "dotted.key=value" each, the value in YAML; later ones win.

    Raises:
        RecipeError: every problem in it, one a line.
        InputError: the recipe does not exist.
    """
    tree = _Tree()
    _add_file(tree, find(source) if isinstance(source, str) else source, ())
    for override in overrides:
        _add_override(tree, override)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(tree.data)
    except ValidationError as error:
        _add_schema_problems(tree, error, Recipe, ())
    _check_names(tree)
    if tree.problems or recipe is None:
        raise RecipeError(list(dict.fromkeys(tree.problems)))
    return recipe


def list_recipes() -> list[Shipped]:
    """The shipped recipes, sorted by name."""
    return [_describe(name) for name in shipped_names()]


def shipped_names() -> list[str]:
    """The names that `find` knows without a file, sorted; bases, whose folder begins with an underscore, are left out."""
    return sorted(name for name in _walk(resources.files("fahooks.recipes"), "") if not name.startswith("_"))


def _describe(name: str) -> Shipped:
    recipe = load(name)
    paper = f"Table {recipe.paper.table}, {recipe.paper.row}: {recipe.paper.error} %" if recipe.paper else ""
    return Shipped(name, recipe.summary, paper)


def _walk(folder: Traversable, prefix: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


def _find(name: str, beside: Path | None) -> Source:
    path = Path(os.path.expanduser(name))
    path = path if beside is None else beside / path
    shipped = name.removesuffix(".yaml")
    if os.path.isfile(path):
        try:
            return Source(str(path), path.read_text(encoding="utf-8"), path.parent)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {str(path)!r} can not be read: {error}") from error
    package = resources.files("fahooks.recipes")
    known = list(_walk(package, ""))
    if shipped in known:
        file = package.joinpath(*f"{shipped}.yaml".split("/"))
        return Source(str(file), file.read_text(encoding="utf-8"), Path(str(package)))
    hint = near(shipped, [k for k in known if not k.startswith("_")])
    raise InputError(f"no recipe is named {name!r}, and there is no such file{hint}; `fahooks ls recipes` lists all")


Key = tuple[str | int, ...]


@dataclass
class _Tree:
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
            value = _child(value, part)
        return None if value is _ABSENT else value

    def problem(self, key: Key, what: str, where: str | None = None) -> None:
        """Note that `what` is wrong at `key`."""
        named = f"{_dotted(key)}: " if key else ""
        self.problems.append(f"{where or self.mark(key)}: {named}{what}")


_ABSENT = object()


def _child(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part, _ABSENT)
    if isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
        return value[part]
    return _ABSENT


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as the number that it is (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)

MAX_NODES = 10_000


class _Reader:
    """Turns YAML text into plain data with the line of every key."""

    def __init__(self, tree: _Tree, label: str | None, where: str = "") -> None:
        self.tree = tree
        self.label = label
        self.where = where
        self.nodes = 0

    def read(self, text: str, at: Key = ()) -> Any:
        """The data of `text`, whose root stands at `at`; `_ABSENT` where it can not be read."""
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
        return _ABSENT

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


def _add_file(tree: _Tree, source: Source, above: tuple[str, ...]) -> None:
    """Merge `source`, after its bases, into `tree`."""
    own = _Tree()
    own.marks[()] = f"{source.label}:1"
    data = _Reader(own, source.label).read(source.text)
    if data is None or (data is not _ABSENT and not isinstance(data, dict)):
        own.problem((), "a recipe is a mapping of keys to values" + ("" if data is None else f" (got {_shown(data)})"))
    if isinstance(data, dict):
        base = data.pop("base", None)
        if base is not None:
            _add_base(tree, own, base, source, above)
        _merge(tree, (), data, own.marks)
    tree.marks[()] = own.marks[()]
    tree.problems += own.problems


def _add_base(tree: _Tree, own: _Tree, base: Any, source: Source, above: tuple[str, ...]) -> None:
    where = own.marks["base",]
    if not isinstance(base, str):
        own.problem(("base",), f"must be the name of one recipe (got {_shown(base)})", where)
        return
    try:
        parent = _find(base, beside=source.folder)
    except InputError as error:
        own.problem(("base",), str(error), where)
        return
    chain = (*above, source.label)
    if any(Path(parent.label).resolve() == Path(label).resolve() for label in chain):
        own.problem(("base",), f"recipes that are based on each other: {' -> '.join((*chain, parent.label))}", where)
        return
    _add_file(tree, parent, chain)


def _merge(tree: _Tree, at: Key, data: dict[str, Any], marks: Mapping[Key, str]) -> None:
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


def _add_override(tree: _Tree, override: str) -> None:
    """Set one dotted key."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        tree.problem((), f"must be dotted.key=value, such as train.epochs=1 (got {override!r})", where="--set")
        return
    key = _parsed_key(tree, name)
    own = _Tree()
    value = _Reader(own, None, "--set").read(text, key)
    tree.problems += own.problems
    if value is _ABSENT:
        return
    if key[0] == "base":
        tree.problem(key, "can only be given in a file", where="--set")
        return
    _set(tree, key, value, own.marks)


def _parsed_key(tree: _Tree, name: str) -> Key:
    """The parts of a dotted key; a number is the place in a list where there is a list."""
    key: Key = ()
    for part in name.split("."):
        key = (*key, int(part) if part.isdecimal() and isinstance(tree.get(key), list) else part)
    return key


def _set(tree: _Tree, key: Key, value: Any, marks: Mapping[Key, str]) -> None:
    target = tree.data
    for depth, part in enumerate(key[:-1]):
        if isinstance(target, dict) and target.get(part) is None:
            tree.marks[key[: depth + 1]] = "--set"
            target[part] = {}
        target = _child(target, part)
    last = key[-1]
    if isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
        for old in [k for k in tree.marks if k[: len(key)] == key]:
            del tree.marks[old]
        tree.marks |= marks
        tree.marks[key] = "--set"
        cast(Any, target)[last] = value
    else:
        tree.problem(key, f"there is no such key, since {_dotted(key[:-1])} is {_shown(tree.get(key[:-1]))}", where="--set")


def _add_schema_problems(
    tree: _Tree, error: ValidationError, schema: type[BaseModel], at: Key, unknown: str = "unknown key"
) -> None:
    """Put what pydantic found into words, one problem a key."""
    found: dict[Key, list[str]] = {}
    for detail in error.errors():
        key = _locate(tree, detail, at)
        if detail["type"] == "extra_forbidden":
            words = unknown + near(str(key[-1]), _fields(tree, schema, key[:-1], at))
        else:
            words = _worded(detail)
        found.setdefault(key, []).append(words)
    for key, wordings in found.items():
        unique = list(dict.fromkeys(wordings))
        text = " or ".join([unique[0], *(w.removeprefix("must be ") for w in unique[1:])])
        value = tree.get(key)
        got = "" if text.startswith("is missing") else f" (got {_shown(value)})"
        text, dash, hint = text.partition(" - did you mean")
        tree.problem(key, f"{text}{got}{dash}{hint}")


def _locate(tree: _Tree, detail: ErrorDetails, at: Key) -> Key:
    """The key in the tree that pydantic means: its own location also has the branch of a union that it tried."""
    key = at
    value = tree.get(at) if at else tree.data
    for part in detail["loc"]:
        child = _child(value, part)
        if child is not _ABSENT:
            key, value = (*key, part), child
    if detail["type"] == "missing":
        key = (*key, detail["loc"][-1])
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        key = (*key, "name")
    return key


def _worded(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        return "is missing"
    if kind == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"must be one of {', '.join(map(repr, choices))}" + near(str(context["tag"]), choices)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be {context['expected']}" + near(str(detail["input"]), choices)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys to values"
    if kind == "string_pattern_mismatch":
        return "must be words of letters, digits, '.', '_' and '-', joined by '/'"
    return detail["msg"].replace("Input should be", "must be").replace("Input should", "must")


def _fields(tree: _Tree, schema: type[BaseModel], section: Key, at: Key) -> list[str]:
    """The keys that `section` may have."""
    inside = section[len(at) :]
    if not inside:
        return sorted(schema.model_fields)
    annotation = schema.model_fields[str(inside[0])].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if inspect.isclass(kind) and issubclass(kind, BaseModel)]
    chosen = tree.get((*section, "name"))
    named = [kind for kind in kinds if "name" in kind.model_fields and chosen in get_args(kind.model_fields["name"].annotation)]
    return sorted({name for kind in named or kinds for name in kind.model_fields})


def _check_names(tree: _Tree) -> None:
    """Check registered names and the options beside them."""
    _check(tree, ("data", "dataset"), plugins.datasets)
    if tree.get(("data", "loader")) != "auto":
        _check(tree, ("data", "loader"), plugins.loaders)
    name = tree.get(("model", "name"))
    if isinstance(name, str) and name in plugins.models:
        _check_options(tree, ("model",), plugins.models.get(name), own={"name"})
    elif isinstance(name, str):
        _try(tree, ("model", "name"), lambda: models.check(name))
    feedback = tree.get(("feedback",))
    for index, entry in enumerate(feedback if isinstance(feedback, list) else []):
        _check_feedback(tree, ("feedback", index), entry)


def _check_feedback(tree: _Tree, key: Key, entry: Any) -> None:
    rule = _check(tree, (*key, "rule"), plugins.rules)
    if rule is not None and _check_options(tree, key, rule, own={"match", "rule"}):
        _try(tree, key, lambda: rule.build(**{k: v for k, v in entry.items() if k not in ("match", "rule")}))
    match = tree.get((*key, "match")) or "*"
    for index in range(int(key[-1])):
        if (tree.get(("feedback", index, "match")) or "*") == match:
            problem = f"feedback.{index} has this pattern already, and the first match wins (got {_shown(match)})"
            tree.problem((*key, "match"), problem)


def _check(tree: _Tree, key: Key, registry: plugins.Registry) -> plugins.Entry | None:
    name = tree.get(key)
    if not isinstance(name, str):
        return None
    found: list[plugins.Entry] = []
    _try(tree, key, lambda: found.append(registry.get(name)))
    return found[0] if found else None


def _try(tree: _Tree, key: Key, check: Any) -> None:
    try:
        check()
    except InputError as error:
        tree.problem(key, str(error))


def _check_options(tree: _Tree, section: Key, entry: plugins.Entry, own: set[str]) -> bool:
    """Check names and types of the options in `section` by the signature of what `entry` names; True if all are right."""
    options = {k: v for k, v in tree.get(section).items() if k not in own}
    schema = _options_schema(entry)
    try:
        schema.model_validate(options)
    except ValidationError as error:
        _add_schema_problems(tree, error, schema, section, unknown=f"{entry.kind} {entry.name!r} has no such option")
        return False
    return True


def _options_schema(entry: plugins.Entry) -> type[BaseModel]:
    target = entry.target.__init__ if inspect.isclass(entry.target) else entry.target
    hints = get_type_hints(target)
    fields: dict[str, Any] = {}
    for name, default in entry.options.items():
        hint = hints.get(name, Any)
        hint = Annotated[hint, Field(strict=False)] if get_origin(hint) in (tuple, set, frozenset) else hint
        fields[name] = (hint, ... if default is inspect.Parameter.empty else default)
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"options of {entry.name}", __config__=config, **fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
