"""Checking: what pydantic and the registries find wrong, put into words with the place where it was written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fahooks import plugins
from fahooks.plugins import InputError, either, near, worded
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
            words = worded(detail)
        found.setdefault(key, []).append(words)
    for key, wordings in found.items():
        text = either(wordings)
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
    dataset = _check(tree, ("data", "dataset"), plugins.datasets)
    if dataset is not None:
        _check_options(tree, ("data", "dataset_options"), own_options(dataset), own=set())
    _check_augmentations(tree, tree.get(("data", "augment")))
    _check_loader(tree)
    name = tree.get(("model", "name"))
    if isinstance(name, str) and name in plugins.models:
        _check_options(tree, ("model",), plugins.models.get(name), own={"name"})
    elif isinstance(name, str):
        from fahooks import models

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
            entry.schema.model_validate({**options, **left})
    except ValidationError:
        return {}
    return left


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _check_loader(tree: Tree) -> None:
    name, key = tree.get(("data", "loader")), ("data", "loader_options")
    if name in (None, "auto"):
        if tree.get(key):
            tree.problem(key, f"needs data.loader to be one by name, and not auto (got {shown(tree.get(key))})")
        return
    loader = _check(tree, ("data", "loader"), plugins.loaders)
    if loader is not None and _check_options(tree, key, loader, own=set()):
        _try(tree, key, lambda: loader.build(**(tree.get(key) or {})))


def _check_feedback(tree: Tree, key: Key, entry: Any) -> None:
    rule = _check(tree, (*key, "rule"), plugins.rules)
    if rule is not None and _check_options(tree, key, rule, own={"match", "rule"}):
        _try(tree, key, lambda: rule.build(**{k: v for k, v in entry.items() if k not in ("match", "rule")}))


def _check_augmentations(tree: Tree, steps: Any) -> None:
    before = len(tree.problems)
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        _check_augmentation(tree, ("data", "augment", index), step)
    shaped = isinstance(steps, list) and all(isinstance(s, dict) and all(isinstance(o, dict) for o in s.values()) for s in steps)
    if shaped and len(tree.problems) == before:
        from fahooks.data import Augment

        _try(tree, ("data", "augment"), lambda: Augment(steps))


def _check_augmentation(tree: Tree, key: Key, step: Any) -> None:
    for name, options in step.items() if isinstance(step, dict) else ():
        entry = _look_up(tree, (*key, name), name, plugins.augmentations)
        if entry is not None and isinstance(options, dict) and _check_options(tree, (*key, name), entry, own=set()):
            _try(tree, (*key, name), lambda entry=entry, options=options: entry.build(**options))


def _check_hook(tree: Tree, key: Key, entry: Any) -> None:
    hook = _check(tree, (*key, "name"), plugins.hooks)
    if hook is not None and _check_options(tree, key, hook, own={"name", "match"}):
        _try(tree, key, lambda: hook.build(**{k: v for k, v in entry.items() if k not in ("name", "match")}))


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
    options = tree.get(section) or {}
    if not isinstance(options, dict):
        return False
    options = {k: v for k, v in options.items() if k not in own}
    schema = entry.schema
    try:
        schema.model_validate(options)
    except ValidationError as error:
        add_schema_problems(tree, error, schema, section, unknown=f"{entry.kind} {entry.name!r} has no such option")
        return False
    return True


def own_options(dataset: plugins.Entry) -> plugins.Entry:
    """A registered dataset without the options that every dataset has, which are data.root and data.download."""
    options = {name: default for name, default in dataset.options.items() if name not in ("root", "download")}
    return replace(dataset, options=options)
