"""Checking: what pydantic and the registries find wrong, put into words with the place where it was written."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Container, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from fahooks import models, plugins
from fahooks.plugins import InputError, near
from fahooks.recipe.schema import OpenSection
from fahooks.recipe.tree import ABSENT, Key, Tree, child_of, shown

SomeSection = TypeVar("SomeSection", bound=OpenSection)

# Options of timm's and torchvision's models that read files or fetch them: a pickle in one could run code.
WEIGHTS_FROM_ELSEWHERE = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("weights", "weights_backbone"),
}


def add_schema_problems(
    tree: Tree, error: ValidationError, schema: type[BaseModel], at: Key, unknown: str = "unknown key"
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
        got = "" if text.startswith("is missing") else f" (got {shown(value)})"
        text, dash, hint = text.partition(" - did you mean")
        tree.problem(key, f"{text}{got}{dash}{hint}")


def _locate(tree: Tree, detail: ErrorDetails, at: Key) -> Key:
    """The key in the tree that pydantic means: its own location also has the branch of a union that it tried."""
    key = at
    value = tree.get(at) if at else tree.data
    for part in detail["loc"]:
        child = child_of(value, part)
        if child is not ABSENT:
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


def _fields(tree: Tree, schema: type[BaseModel], section: Key, at: Key) -> list[str]:
    """The keys that `section` may have."""
    inside = section[len(at) :]
    if not inside:
        return sorted(schema.model_fields)
    annotation = schema.model_fields[str(inside[0])].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if inspect.isclass(kind) and issubclass(kind, BaseModel)]
    chosen = tree.get((*section, "name"))
    named = [kind for kind in kinds if "name" in kind.model_fields and chosen in get_args(kind.model_fields["name"].annotation)]
    return sorted({name for kind in named or kinds for name in kind.model_fields})


def check_names(tree: Tree) -> None:
    """Check registered names and the options beside them."""
    _check(tree, ("data", "dataset"), plugins.datasets)
    steps = tree.get(("data", "augment"))
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        _check_augmentation(tree, ("data", "augment", index), step)
    if tree.get(("data", "loader")) != "auto":
        _check(tree, ("data", "loader"), plugins.loaders)
    name = tree.get(("model", "name"))
    if isinstance(name, str) and name in plugins.models:
        _check_options(tree, ("model",), plugins.models.get(name), own={"name"})
    elif isinstance(name, str):
        _try(tree, ("model", "name"), lambda: models.check(name))
        for option in sorted(WEIGHTS_FROM_ELSEWHERE & tree.get(("model",)).keys()):
            tree.problem(
                ("model", option), f"weights start at random; a recipe reads none (got {shown(tree.get(('model', option)))})"
            )
    feedback = tree.get(("feedback",))
    first: dict[str, int] = {}
    for index, entry in enumerate(feedback if isinstance(feedback, list) else []):
        _check_feedback(tree, ("feedback", index), entry)
        match = str(tree.get(("feedback", index, "match")) or "*")
        if first.setdefault(match, index) != index:
            problem = f"feedback.{first[match]} has this pattern already, and the first match wins (got {shown(match)})"
            tree.problem(("feedback", index, "match"), problem)
    hooks = tree.get(("hooks",))
    for index, entry in enumerate(hooks if isinstance(hooks, list) else []):
        _check_hook(tree, ("hooks", index), entry)


def with_defaults(section: SomeSection, entry: plugins.Entry | None, fitting: Mapping[str, Any] | None = None) -> SomeSection:
    """`section` with the options that it leaves out written out.

    Arguments:
        section: what to complete.
        entry: what it names; None where that is not registered.
        fitting: options that go before the defaults of `entry`.
    """
    return section.model_copy(update=left_out(section.options, entry, fitting, own=type(section).model_fields))


def left_out(
    options: Mapping[str, Any],
    entry: plugins.Entry | None,
    fitting: Mapping[str, Any] | None = None,
    own: Container[str] = (),
) -> dict[str, Any]:
    """The options of `entry` that `options` leaves out, with their defaults.

    A default that YAML can not say stays out. So do all where one is not what its own annotation allows: a recipe with it could
    not be read back.

    Arguments:
        options: what is given.
        entry: what they are options of; None where that is not registered.
        fitting: options that go before the defaults of `entry`.
        own: names that are no options.
    """
    defaults = {**(entry.options if entry else {}), **(fitting or {})}
    left = {k: v for k, v in defaults.items() if k not in options and k not in own and _plain(v)}
    try:
        if entry:
            _options_schema(entry).model_validate({**options, **left})
    except ValidationError:
        return {}
    return left


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _check_feedback(tree: Tree, key: Key, entry: Any) -> None:
    rule = _check(tree, (*key, "rule"), plugins.rules)
    if rule is not None and _check_options(tree, key, rule, own={"match", "rule"}):
        _try(tree, key, lambda: rule.build(**{k: v for k, v in entry.items() if k not in ("match", "rule")}))


def _check_augmentation(tree: Tree, key: Key, step: Any) -> None:
    for name, options in step.items() if isinstance(step, dict) else ():
        entry = _look_up(tree, (*key, name), name, plugins.augmentations)
        if entry is not None and isinstance(options, dict) and _check_options(tree, (*key, name), entry, own=set()):
            _try(tree, (*key, name), lambda entry=entry, options=options: entry.build(**options))


def _check_hook(tree: Tree, key: Key, entry: Any) -> None:
    hook = _check(tree, (*key, "name"), plugins.hooks)
    if hook is not None and _check_options(tree, key, hook, own={"name", "match"}):
        _try(tree, key, lambda: hook.build(**{k: v for k, v in entry.items() if k != "name" and (k, v) != ("match", None)}))


def _check(tree: Tree, key: Key, registry: plugins.Registry) -> plugins.Entry | None:
    name = tree.get(key)
    return _look_up(tree, key, name, registry) if isinstance(name, str) else None


def _look_up(tree: Tree, key: Key, name: str, registry: plugins.Registry) -> plugins.Entry | None:
    found: list[plugins.Entry] = []
    _try(tree, key, lambda: found.append(registry.get(name)))
    return found[0] if found else None


def _try(tree: Tree, key: Key, check: Any) -> None:
    try:
        check()
    except InputError as error:
        tree.problem(key, str(error))


def _check_options(tree: Tree, section: Key, entry: plugins.Entry, own: set[str]) -> bool:
    """Check names and types of the options in `section` by the signature of what `entry` names; True if all are right."""
    options = {k: v for k, v in tree.get(section).items() if k not in own}
    schema = _options_schema(entry)
    try:
        schema.model_validate(options)
    except ValidationError as error:
        add_schema_problems(tree, error, schema, section, unknown=f"{entry.kind} {entry.name!r} has no such option")
        return False
    return True


@cache
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
