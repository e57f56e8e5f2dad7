"""Models by name: registered ones, timm's, torchvision's, and factories in a file.

Weights are never downloaded: every model comes freshly initialised from torch's global generator.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from fahooks.plugins import InputError, UnknownName, models, near, one_line

UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")


def build(spec: str, /, **options: Any) -> nn.Module:
    """Make the model that `spec` names, with random weights.

    Arguments:
        spec: a registered name, `timm/NAME`, `torchvision/NAME`, or `path/to/file.py:factory`.
        options: keyword arguments of that model.

    Raises:
        InputError: the name, the file, the factory or an option is unknown, or the model refuses its options.
    """
    target = _resolve(spec)
    try:
        model = target(**options)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a factory is code of others: it may raise anything, or call sys.exit
        given = ", ".join(f"{k}={v!r}" for k, v in options.items()) or "no options"
        meant = near(unknown[1], options_for_images(spec, (0, 0, 0), 0)) if (unknown := UNKNOWN_OPTION.search(str(error))) else ""
        raise InputError(f"model {spec!r} could not be built with {given}: {one_line(error)}{meant}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec!r} did not return a torch.nn.Module, but an object of type {type(model).__name__}")
    return model


def build_for_images(spec: str, shape: tuple[int, int, int], classes: int, /, **options: Any) -> nn.Module:
    """Make the model that `spec` names for images of `shape` (C, H, W) and `classes` classes; what `options` says comes first.

    Raises:
        InputError: as `build`.
    """
    return build(spec, **(options_for_images(spec, shape, classes) | options))


def options_for_images(spec: str, shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """The options that fit the model that `spec` names to images of `shape` (C, H, W) and `classes` classes."""
    channels, height, _ = shape
    source = spec.partition("/")[0]
    if spec in models:
        fitting = {"in_channels": channels, "image_size": height, "classes": classes}
        return {k: v for k, v in fitting.items() if k in models.get(spec).options}
    if source == "timm":
        return {"in_chans": channels, "num_classes": classes}
    if source == "torchvision":
        return {"num_classes": classes}
    return {}


def check(spec: str) -> None:
    """Do nothing if `spec` names a model that is registered, in timm or in torchvision.

    Raises:
        UnknownName: it does not; the message has the names that came close.
    """
    if ".py:" in spec:
        raise UnknownName(f"{spec!r} is a file: only registered models, timm/NAME and torchvision/NAME can be named here")
    _resolve(spec, "timm/NAME and torchvision/NAME")


def input_size(model: nn.Module, spec: str) -> tuple[int, ...]:
    """The shape of one example input, without the batch: (C, H, W).

    Arguments:
        model: what `build(spec)` returned.
        spec: the name it was built from.

    Raises:
        InputError: the model does not say.
    """
    own = getattr(model, "input_size", None)
    source, _, name = spec.partition("/")
    if own is not None:
        return tuple(own)
    if source == "timm" and "input_size" in getattr(model, "pretrained_cfg", {}):
        return tuple(cast(Any, model).pretrained_cfg["input_size"])
    if source == "torchvision" and name in _torchvision().list_models(module=_torchvision()):
        side = 299 if name == "inception_v3" else getattr(model, "image_size", 224)
        return (3, side, side)
    raise InputError(
        f"the input shape of {spec!r} is not known: give the model an attribute, model.input_size = (channels, height, width)"
    )


def _resolve(spec: str, others: str = "timm/NAME, torchvision/NAME and path/to/file.py:factory") -> Callable[..., Any]:
    if ".py:" in spec:
        return _factory(spec)
    if spec in models:
        return models.get(spec).build
    source, _, name = spec.partition("/")
    if source == "timm" and name:
        return _from_timm(name)
    if source == "torchvision" and name:
        return _from_torchvision(name)
    known = [
        *models.names(),
        *(f"timm/{n}" for n in _timm_names()),
        *(f"torchvision/{n}" for n in _torchvision().list_models()),
    ]
    raise UnknownName(
        f"no model is named {spec!r}{near(spec, known)}; `fahooks ls models` lists the registered ones, and {others} work too"
    )


def _from_timm(name: str) -> Callable[..., nn.Module]:
    import timm

    if not timm.is_model(name):
        raise UnknownName(f"timm has no model named {name!r}{near(name, timm.list_models())}; timm.list_models() lists all")
    return lambda **options: timm.create_model(name, pretrained=False, **options)


def _from_torchvision(name: str) -> Callable[..., nn.Module]:
    known = _torchvision().list_models()
    if name not in known:
        raise UnknownName(
            f"torchvision has no model named {name!r}{near(name, known)}; torchvision.models.list_models() lists all"
        )
    if "weights_backbone" in inspect.signature(_torchvision().get_model_builder(name)).parameters:
        return lambda **options: _torchvision().get_model(name, weights=None, weights_backbone=None, **options)
    return lambda **options: _torchvision().get_model(name, weights=None, **options)


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _torchvision() -> ModuleType:
    import torchvision.models

    return torchvision.models


def _factory(spec: str) -> Callable[..., Any]:
    path, _, name = spec.rpartition(":")
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise InputError(f"there is no file {path!r} to take {name!r} from")
    # A name of its own: one such as json would take the place of a module that others import.
    own_name = f"_fahooks_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    module_spec = importlib.util.spec_from_file_location(own_name, file)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{path!r} can not be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    # As in `python file.py`: it may import what lies beside it, and dataclasses look their module up.
    sys.modules[own_name] = module
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(own_name, None)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise InputError(f"importing {path!r} failed: {one_line(error)}") from error
    target = getattr(module, name, None)
    if target is not None and not callable(target):
        raise InputError(f"{name!r} in {path!r} is no function that makes a model, but an object of type {type(target).__name__}")
    if not callable(target):
        offered = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{path!r} has no function {name!r}{near(name, offered)}")
    return target
