"""Checking: what pydantic and the registries find wrong, put into words with the place where it was written."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fahooks import plugins
from fahooks.plugins import InputError, either, near, worded
from fahooks.recipe.schema import OpenSection, default_root
from fahooks.recipe.tree import ABSENT, Key, Tree, child_of, shown

# What other programs and papers call a key.
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "learningrate", "eta", "alpha", "base_lr"), "lr"),
    **dict.fromkeys(("wd", "l2", "decay", "regularization"), "weight_decay"),
    **dict.fromkeys(("beta", "beta1", "beta2"), "betas"),
    **dict.fromkeys(("bs", "minibatch", "mini_batch_size", "batch"), "batch_size"),
    **dict.fromkeys(("net", "network", "arch", "architecture", "backbone"), "model"),
    **dict.fromkeys(("optimizer", "optimiser"), "optim"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule"), "schedule"),
    **dict.fromkeys(("rule", "rules", "method"), "feedback"),
    **dict.fromkeys(("constraint", "constraints", "regularizers"), "hooks"),
    **dict.fromkeys(("transform", "transforms", "augmentation", "augmentations"), "augment"),
    **dict.fromkeys(("dir", "folder", "data_dir", "data_path"), "root"),
    **dict.fromkeys(("val", "val_split", "valid", "holdout"), "validation"),
    **dict.fromkeys(("subset", "n_train", "num_samples"), "limit"),
    **dict.fromkeys(("amp", "mixed_precision", "dtype", "fp16", "bf16"), "precision"),
    **dict.fromkeys(("clip", "grad_clip", "gradient_clipping", "max_norm", "clip_grad_norm"), "clip_norm"),
    **dict.fromkeys(("iterations", "steps", "max_iter", "num_steps"), "max_steps"),
    **dict.fromkeys(("gpu", "gpus", "cuda", "accelerator"), "device"),
    **dict.fromkeys(("step_size", "milestones"), "every"),
    "random_seed": "seed",
}

# The home of the datasets that are folders of images, none of which can be downloaded.
IMAGE_FOLDERS = "fahooks.data.image_folder"

SomeSection = TypeVar("SomeSection", bound=OpenSection)

# Options of timm's and torchvision's models that read files or fetch them: a pickle in one could run code.
WEIGHTS_FROM_ELSEWHERE = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("weights", "weights_backbone"),
}


def add_schema_problems(
    tree: Tree, error: ValidationError, schema: type[BaseModel], at: Key, unknown: str = "unknown key"
) -> None:
    """Put what pydantic found into words, one problem a key: what could not be read has one already."""
    found: dict[Key, list[str]] = {}
    for detail in error.errors():
        key = _locate(tree, detail, at)
        if key in tree.faulty:
            continue
        if detail["type"] == "extra_forbidden":
            words = unknown + _meant(key, _fields(tree, schema, key[:-1], at), schema)
        else:
            words = worded(detail)
        found.setdefault(key, []).append(words)
    for key, wordings in found.items():
        text = either(wordings)
        value = tree.get(key)
        got = "" if text.startswith("is missing") else f" (got {shown(value)})"
        if text == "is missing" and key[:-1] in tree.renamed:
            text += f": that of {shown(tree.renamed[key[:-1]])} is not taken over"
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


def _meant(key: Key, fields: Sequence[str], schema: type[BaseModel]) -> str:
    """A clause with the keys that who wrote the unknown `key` may have had in mind, empty where none is close."""
    *section, name = map(str, key)
    if ":" in name:
        return f" - did you mean {name.replace(':', ': ')!r}, with a space?"
    known = SYNONYMS.get(name.lower(), name)
    if known in fields:
        return f" - did you mean {known!r}?"
    others = {other for other in _dotted_keys(schema) if not section or not other.startswith(f"{section[0]}.")}
    elsewhere = sorted(other for other in others if other != "name" and f".{other}".endswith(f".{known}"))
    return f" - did you mean {', '.join(map(repr, elsewhere))}?" if elsewhere else near(name, fields)


def _dotted_keys(schema: type[BaseModel]) -> set[str]:
    """All keys of `schema` with those of its sections, such as optim and optim.lr; a name says which kind it is, and is none."""
    keys = set(schema.model_fields)
    for name, info in schema.model_fields.items():
        for kind in (info.annotation, *get_args(info.annotation)):
            if inspect.isclass(kind) and issubclass(kind, BaseModel):
                keys |= {f"{name}.{field}" for field in kind.model_fields if field != "name"}
    return keys


def check_warmup(tree: Tree) -> None:
    """Refuse a warm-up that the run ends in."""
    warmup, epochs = tree.get(("schedule", "warmup")), tree.get(("train", "epochs"))
    if isinstance(warmup, int | float) and isinstance(epochs, int) and warmup > epochs > 0:
        what = f"must be at most train.epochs, {epochs}, for the learning rate to arrive at what the schedule says"
        tree.problem(("schedule", "warmup"), f"{what} (got {shown(warmup)})")


def check_folder(tree: Tree) -> None:
    """Refuse folders of images that are not there."""
    data = tree.get(("data",))
    name = data.get("dataset") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in plugins.datasets:
        return
    root, path = tree.get(("data", "root")), tree.get(("data", "dataset_options", "path"))
    root, path = default_root() if root is None else root, "" if path is None else path
    if plugins.datasets.get(name).target.__module__ != IMAGE_FOLDERS or not (isinstance(root, str) and isinstance(path, str)):
        return
    root, path = os.path.expanduser(root), os.path.expanduser(path)
    if not os.path.isdir(os.path.join(root, path)):
        in_root = bool(path) and (os.path.isabs(path) or os.path.isdir(root))
        key = ("data", "dataset_options", "path") if in_root else ("data", "root")
        tree.problem(key, f"there is no such folder (got {shown(os.path.join(root, path) if in_root else root)})")


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
