"""What a run needs before its first step: images on the device, the converted model, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fahooks import models
from fahooks.data import MemoryLoader, Split, load, split
from fahooks.plugins import InputError, loaders
from fahooks.recipe import Recipe
from fahooks.surgery import Report, convert
from fahooks.training.optimizers import make_optimizer, make_schedule

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Setup:
    """Everything of a run that lives in memory.

    Attributes:
        recipe: what it was made from, automatic choices made.
        device: where model and images are.
        train: loader of the images to learn from.
        validation: loader of the images that choose the best epoch.
        test: loader of the images that only the finished model sees.
        model: the network, converted.
        forward: the model, or its compiled version.
        report: what the conversion did.
        optimizer: for every parameter of the model.
        schedule: moved on once an epoch.
        autocast: the context that every forward pass runs in.
    """

    recipe: Recipe
    device: torch.device
    train: MemoryLoader
    validation: MemoryLoader
    test: MemoryLoader
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    report: Report
    optimizer: Optimizer
    schedule: LRScheduler
    autocast: torch.autocast


def prepare(recipe: Recipe) -> Setup:
    """Load the data and build the model of `recipe`. Seeds torch's global generator, from which weights and dropout are drawn.

    Raises:
        InputError: the data is not to be had, or model, rules, data and device do not fit together.
    """
    recipe = resolve(recipe)
    device = _device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    dataset = load(recipe.data.dataset, root=recipe.data.root, download=recipe.data.download)
    parts = split(dataset, validation=recipe.data.validation, limit=recipe.data.limit, seed=recipe.seed)
    train, validation, test = _loaders(recipe, parts, device)

    torch.manual_seed(recipe.seed)
    model = models.build_for_images(recipe.model.name, dataset.shape, dataset.classes, **recipe.model.options)
    report = convert(model, {f.match: {"rule": f.rule, **f.options} for f in recipe.feedback}, seed=recipe.seed)
    model = model.to(device)
    if recipe.train.channels_last:
        model = cast(Any, model).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe.optim)
    return Setup(
        recipe=recipe,
        device=device,
        train=train,
        validation=validation,
        test=test,
        model=model,
        forward=cast(Any, torch.compile(model)) if recipe.train.compile else model,
        report=report,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, recipe.schedule, recipe.train.epochs),
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"),
    )


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with automatic choices made: `loader: auto` is the memory loader."""
    if recipe.data.loader != "auto":
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"loader": "memory"})})


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no GPU here: use train.device=cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _loaders(recipe: Recipe, parts: Split, device: torch.device) -> tuple[MemoryLoader, MemoryLoader, MemoryLoader]:
    """Loaders of the three sets; all are normalised by the statistics of the images that are trained on."""
    make = loaders.get(recipe.data.loader).build
    mean, std = parts.train.statistics()
    common = {"mean": mean, "std": std, "seed": recipe.seed, "device": device, "channels_last": recipe.train.channels_last}
    return (
        make(images=parts.train, batch_size=recipe.data.batch_size, **common),
        make(images=parts.validation, batch_size=EVALUATION_BATCH, **common),
        make(images=parts.test, batch_size=EVALUATION_BATCH, **common),
    )
