"""What a run needs before its first step: images on the device, the converted model, optimizer and schedule."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fahooks import models
from fahooks.data import Augment, Batch, Dataset, Loader, Split, Stream, View, load, split
from fahooks.hooks import Attachment, attach
from fahooks.observation import as_found
from fahooks.plugins import InputError, augmentations, hooks, loaders, rules
from fahooks.plugins import models as registered
from fahooks.recipe import Recipe, left_out, with_defaults
from fahooks.rules import targets
from fahooks.surgery import Report, convert, feedback_rules
from fahooks.training.checkpoint import Stateful
from fahooks.training.optimizers import make_optimizer, make_schedule

EVALUATION_BATCH = 500
SMALL_IMAGE = 3 * 64 * 64


@dataclass(frozen=True)
class Setup:
    """Everything of a run that lives in memory.

    Attributes:
        recipe: what it was made from, automatic choices made and defaults written out.
        choices: what was chosen where the recipe said "auto", and why, by dotted key.
        device: where model and images are.
        train: the images to learn from.
        validation: the images that choose the best epoch.
        test: the images that only the finished model sees.
        model: the network, converted.
        forward: the model, or its compiled version.
        report: what the conversion did.
        optimizer: for every parameter of the model that requires a gradient.
        schedule: moved on once an epoch.
        hooks: what acts at every step of the optimizer; None where nothing does.
        autocast: the context that every forward pass runs in.
    """

    recipe: Recipe
    choices: dict[str, str]
    device: torch.device
    train: Stream
    validation: Stream
    test: Stream
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    report: Report
    optimizer: Optimizer
    schedule: LRScheduler
    hooks: Attachment | None
    autocast: torch.autocast

    @property
    def parts(self) -> dict[str, Stateful]:
        """What keeps the state that a run needs to go on, by name."""
        parts: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.hooks is None else parts | {"hooks": self.hooks}


def prepare(recipe: Recipe) -> Setup:
    """Load the data and build the model of `recipe`. Seeds torch's global generator, from which weights and dropout are drawn.

    Raises:
        InputError: the data is not to be had, or model, rules, hooks, data and device do not fit together.
    """
    choices = {"data.loader": "memory: auto always takes it, as every dataset is held in memory"}
    choices = choices if recipe.data.loader == "auto" else {}
    device = _device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    dataset = load(recipe.data.dataset, root=recipe.data.root, download=recipe.data.download)
    recipe = resolve(recipe, dataset)
    parts = split(dataset, validation=recipe.data.validation, limit=recipe.data.limit, seed=recipe.seed)
    train, validation, test = _streams(recipe, parts, device)

    torch.manual_seed(recipe.seed)
    shape = seen_shape(recipe, dataset)
    model = models.build_for_images(recipe.model.name, shape, dataset.classes, **recipe.model.options)
    report = convert(model, {f.match: {"rule": f.rule, **f.options} for f in recipe.feedback}, seed=recipe.seed)
    model = model.to(device)
    if recipe.train.channels_last:
        model = cast(Any, model).to(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
    _try(model, recipe.model.name, next(iter(train)), dataset.classes, autocast)
    optimizer = make_optimizer(model, recipe.optim)
    return Setup(
        recipe=recipe,
        choices=choices,
        device=device,
        train=train,
        validation=validation,
        test=test,
        model=model,
        forward=cast(Any, torch.compile(model)) if recipe.train.compile else model,
        report=report,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, recipe.schedule, recipe.train.epochs),
        hooks=_attach(recipe, model, optimizer, total_steps=recipe.train.epochs * len(train)),
        autocast=autocast,
    )


def resolve(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with nothing left to choose, so that it is the same run anywhere.

    `loader: auto` is the memory loader, data.root is absolute, and the options of augmentations, rules, hooks and model are
    written out with their defaults, those of the model as they fit the images of `dataset`.

    Raises:
        InputError: the images of `dataset` do not go through the augmentations.
    """
    loader = "memory" if recipe.data.loader == "auto" else recipe.data.loader
    root = os.path.abspath(Path(recipe.data.root).expanduser())
    augment = [
        {name: {**options, **left_out(options, augmentations.get(name))} for name, options in step.items()}
        for step in recipe.data.augment
    ]
    data = recipe.data.model_copy(update={"loader": loader, "root": root, "augment": augment})
    fitting = models.options_for_images(recipe.model.name, seen_shape(recipe, dataset), dataset.classes)
    model = with_defaults(recipe.model, registered.get(recipe.model.name) if recipe.model.name in registered else None, fitting)
    feedback = [with_defaults(entry, rules.get(entry.rule)) for entry in recipe.feedback]
    attached = [with_defaults(entry, hooks.get(entry.name)) for entry in recipe.hooks]
    return recipe.model_copy(update={"data": data, "model": model, "feedback": feedback, "hooks": attached})


def _attach(recipe: Recipe, model: nn.Module, optimizer: Optimizer, total_steps: int) -> Attachment | None:
    if not recipe.hooks and not any(rule.learns for rule in feedback_rules(model).values()):
        return None
    given = [{"name": hook.name, **({"match": hook.match} if hook.match else {}), **hook.options} for hook in recipe.hooks]
    return attach(model, optimizer, *given, total_steps=total_steps, seed=recipe.seed)


def seen_shape(recipe: Recipe, dataset: Dataset) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images of `dataset` as the model sees them.

    Raises:
        InputError: they do not go through the augmentations.
    """
    return Augment(recipe.data.augment).shape(dataset.shape)


def _try(model: nn.Module, name: str, batch: Batch, classes: int, autocast: torch.autocast) -> None:
    """Run one batch through the model, which stays as it was.

    Raises:
        InputError: the model does not run on these images, does not give logits [N, classes], or a rule has something against it.
    """
    shape = "x".join(map(str, batch.images.shape[1:]))
    modes = [(module, module.training) for module in model.modules()]
    try:
        # With gradients: some rules look at the model's output only then.
        with as_found(model), autocast, targets(model, batch.labels):
            logits = model.eval()(batch.images)
    except InputError:
        raise
    except Exception as error:  # a model is code of others: it may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"model {name!r} does not run on images of shape {shape} (CxHxW): {reason}; name another, or set its options"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    images = len(batch.labels)
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(given, tuple) or len(given) != 2 or given[0] != images or given[1] < classes:
        raise InputError(
            f"model {name!r} must give logits of shape {(images, classes)} for {images} images of shape {shape} (CxHxW), "
            f"and gave {given}: name another, or set its options"
        )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no GPU here: use train.device=cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _streams(recipe: Recipe, parts: Split, device: torch.device) -> tuple[Stream, Stream, Stream]:
    """Streams of the three sets; all are normalised by the statistics of the images that are trained on."""
    loader: Loader = loaders.get(recipe.data.loader).build()
    mean, std = parts.train.statistics()
    augment = Augment(recipe.data.augment, seed=recipe.seed)
    # Large images do not fit into memory by the hundreds; a batch that can be trained on can be evaluated.
    small = math.prod(augment.shape(parts.train.shape)) <= SMALL_IMAGE
    training = View(
        batch_size=recipe.data.batch_size,
        training=True,
        mean=mean,
        std=std,
        seed=recipe.seed,
        device=device,
        channels_last=recipe.train.channels_last,
        augment=augment,
    )
    evaluation = replace(training, training=False, batch_size=EVALUATION_BATCH if small else recipe.data.batch_size)
    views = ((parts.train, training), (parts.validation, evaluation), (parts.test, evaluation))
    for examples, _ in views:
        loader.prepare(examples)
    train, validation, test = (loader.open(examples, view) for examples, view in views)
    return train, validation, test
