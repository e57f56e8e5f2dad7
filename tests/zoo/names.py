"""Every model of the zoo by name, and how each is made small enough to be checked."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision.models
from torch import nn
from torch.utils import _pytree as pytree

from tests.zoo.exactness import TooSmall, check
from tests.zoo.shrinking import Unfilled, fill, images, shorten

SIDES = (32, 28, 64, 56, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
"""Image sides to try, the ones that most models take first."""

NARROWER: dict[str, dict[str, Any]] = {
    "aimv2_3b_*": {"embed_dim": 768},
    "convnext_xxlarge": {"dims": [96, 192, 384, 768]},
    "convnextv2_huge": {"dims": [88, 176, 352, 704]},
    "davit_giant": {"embed_dims": (96, 192, 384, 768)},
    "davit_huge*": {"embed_dims": (64, 128, 256, 512)},
    "hiera_huge_224": {"embed_dim": 64},
    "coatnet_5_224": {"embed_dim": (64, 128, 256, 512)},
    "maxvit_xlarge_*": {"embed_dim": (64, 128, 256, 512)},
    "rdnet_large": {"growth_rates": [32] * 12},
    "regnety_640": {"w0": 88, "wa": 36.87, "group_size": 82},
    "regnety_1280": {"w0": 56, "wa": 20.1, "group_size": 33},
    "regnety_2560": {"w0": 80, "wa": 28.85, "group_size": 47},
    "resnetv2_*x[34]_bit": {"channels": (128, 256, 512, 1024)},
    "resnext101_32x32d": {"base_width": 4},
    "swinv2_cr_giant_*": {"embed_dim": 128},
    "swinv2_cr_huge_224": {"embed_dim": 128},
    "swinv2_cr_huge_384": {"embed_dim": 88},
    "vgg*": {"mlp_ratio": 0.05},
    "vit_5b_patch16_sapiens2": {"embed_dim": 640},
    "vit_7b_patch16_dinov3": {"embed_dim": 1024},
}
"""Options of timm that make models narrow which would take gigabytes, by pattern."""

MORE_SIDES = 5
"""How many sides of images are tried where the gradients vanish."""


class Unfit(Exception):
    """The model, as it is without fahooks, does not run here."""


@dataclass(frozen=True)
class Size:
    """A way to make a model small.

    Attributes:
        label: how tables call it.
        cut: takes blocks out of the model, and returns how many.
        most_bytes: of the parameters that are left, in float64.
    """

    label: str
    cut: Callable[[nn.Module], int]
    most_bytes: float


SIZES = (
    Size("two blocks of a kind", partial(shorten, keep=2), 0.4 * 2**30),
    Size("whole", lambda model: 0, 0.4 * 2**30),
    Size("one block of a kind", partial(shorten, keep=1), 2**30),
    Size("one block of a kind, numbered ones too", partial(shorten, keep=1, rows=(nn.Module,)), 2**30),
    Size("whole", lambda model: 0, 2**30),
)
"""Tried in this order, as long as the model does not run or is too large."""


@dataclass(frozen=True)
class Small:
    """A model that was made small, and runs.

    Attributes:
        model: filled, in float64.
        inputs: what it is called with.
        side: of the images.
        size: label of what was taken out.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    side: int
    size: str


def all_names() -> list[str]:
    """timm/NAME for every model of timm, torchvision/NAME for every classification model of torchvision."""
    ours = [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    return [f"timm/{name}" for name in timm.list_models()] + ours


def family(name: str) -> str:
    """The module that defines a model, such as timm.models.beit."""
    source, _, rest = name.partition("/")
    if source == "timm":
        return timm.models.model_entrypoint(rest).__module__
    return torchvision.models.get_model_builder(rest).__module__


def small(name: str) -> Iterator[Small]:
    """The model called `name` on images of several sides, small ones first; one at least.

    Raises:
        Unfit: it does not run, or takes too much memory.
    """
    make, default = _maker(name)
    sides = [side for side in SIDES if side <= default] + ([default] if default not in SIDES else [])
    reasons: list[str] = []
    ran = False
    for size in SIZES:
        for side in sides:
            try:
                model = _cut(make, side, size)
                if model is None:
                    break
                x = images(side)
                _try(model, x)
            except Exception as error:  # models say in many ways that they do not take a size
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            ran = True
            yield Small(model, (x,), side, size.label)
        if ran:
            return
    raise Unfit(reasons[-1] if reasons else f"more than {SIZES[-1].most_bytes / 2**30:.1f} GiB of float64 parameters")


def check_by_name(name: str) -> tuple[Small, int]:
    """Check the model called `name`, as small as it shows something.

    Returns:
        The model, and how many of its weights were converted.

    Raises:
        Unfit: it does not run without fahooks, or takes too much memory.
        Inexact: the conversion is not right.
        TooSmall: its gradients vanish on images of every size that was tried.
    """
    vanished = TooSmall()
    for made in itertools.islice(small(name), MORE_SIDES):
        try:
            return made, check(made.model, made.inputs)
        except TooSmall as error:
            vanished = error
    raise vanished


def _cut(make: Callable[[int], nn.Module], side: int, size: Size) -> nn.Module | None:
    """The filled model; None where it is too large, or where nothing could be taken out."""
    with Unfilled():
        model = make(side)
    if not size.cut(model) and size.label != "whole":
        return None
    return None if 8 * sum(p.numel() for p in model.parameters()) > size.most_bytes else fill(model)


def _try(model: nn.Module, x: torch.Tensor) -> None:
    """Run the model on `x` in both modes, and send an error back.

    Raises:
        Unfit: what it gives are no numbers.
    """
    with torch.no_grad():
        evaluated = model.eval()(x)
    trained = copy.deepcopy(model.train())(x)
    found = [leaf for leaf in pytree.tree_leaves((evaluated, trained)) if isinstance(leaf, torch.Tensor)]
    if not found or not all(bool(leaf.isfinite().all()) for leaf in found):
        raise Unfit("its outputs are no numbers")
    torch.stack([leaf.sum() for leaf in found if leaf.requires_grad]).sum().backward()


def _maker(name: str) -> tuple[Callable[[int], nn.Module], int]:
    """What makes the model for images of a side, and the side that it is meant for."""
    source, _, rest = name.partition("/")
    if source == "timm":
        return _timm(rest)
    default = {"inception_v3": 299}.get(rest, 224)
    options = {"weights": None, "num_classes": 10} | ({"init_weights": False} if rest in ("googlenet", "inception_v3") else {})
    takes_size = rest.startswith("vit_")

    def make(side: int) -> nn.Module:
        return torchvision.models.get_model(rest, **options, **({"image_size": side} if takes_size else {}))

    return make, default


def _timm(name: str) -> tuple[Callable[[int], nn.Module], int]:
    cfg = timm.models.get_pretrained_cfg(name)
    default = cfg.input_size[-1] if cfg is not None else 224
    options: list[dict[str, Any]] = [{"num_classes": 10, "img_size": default}, {"num_classes": 10}, {"img_size": default}, {}]
    narrower = {k: v for glob, chosen in NARROWER.items() if fnmatch.fnmatchcase(name, glob) for k, v in chosen.items()}
    for given in ({**narrower, **others} for others in options):
        try:
            with Unfilled():
                timm.create_model(name, **given)
        except TypeError as error:
            if "unexpected keyword" not in str(error) and "multiple values" not in str(error):
                raise Unfit(f"TypeError: {error}") from error
        else:
            return partial(_make_timm, name, given), default
    raise Unfit("it can not be made with any options")


def _make_timm(name: str, options: dict[str, Any], side: int) -> nn.Module:
    make: Any = timm.create_model
    return make(name, **{option: side if option == "img_size" else value for option, value in options.items()})
