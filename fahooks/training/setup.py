"""What a run needs before its first step: images on the device, the converted model, optimizer and schedule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fahooks import models
from fahooks.data import Dataset, Stream
from fahooks.hooks import Attachment, attach
from fahooks.plugins import Doubtful, InputError
from fahooks.recipe import Recipe
from fahooks.rules.passes import passes_of
from fahooks.surgery import Report, convert, feedback_rules
from fahooks.surgery.choice import generator_seed
from fahooks.training import device as devices
from fahooks.training import distributed
from fahooks.training.average import Average
from fahooks.training.checkpoint import Stateful
from fahooks.training.failures import worded
from fahooks.training.optimizers import make_optimizer, make_schedule
from fahooks.training.resolution import resolve, seen_shape, with_data
from fahooks.training.streams import Streams, open_streams
from fahooks.training.trial import try_on, try_smallest_pass


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
        wrapped: what a forward pass in training calls: the model, or what makes it one of several.
        forward: the same, or its compiled version.
        report: what the conversion did.
        optimizer: for every parameter of the model that requires a gradient.
        schedule: moved on at every step.
        direct: whether a rule of the model has to do with whole forward passes, and may ask for their targets.
        hooks: what acts at every step of the optimizer; None where nothing does.
        autocast: the context that every forward pass runs in.
        scaler: of the loss; enabled for float16 only.
        average: of the weights over the steps; None where the recipe asks for none.
    """

    recipe: Recipe
    choices: Mapping[str, str]
    device: torch.device
    train: Stream
    validation: Stream
    test: Stream
    model: nn.Module
    wrapped: nn.Module
    forward: Callable[[Tensor], Tensor]
    report: Report
    optimizer: Optimizer
    schedule: LRScheduler
    direct: bool
    hooks: Attachment | None
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    average: Average | None

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated, and saved as best: the average where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def steps(self) -> int:
        """How many steps of the optimizer a whole run takes."""
        steps, most = self.recipe.train.epochs * len(self.train), self.recipe.train.max_steps
        return steps if most is None else min(steps, most)

    @property
    def parts(self) -> dict[str, Stateful]:
        """What keeps the state that a run needs to go on, by name."""
        parts: dict[str, Stateful | None] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "hooks": self.hooks,
            "scaler": self.scaler,
            "average": self.average,
        }
        whole = distributed.Whole if distributed.is_sharded(self.model) else lambda part: part
        return {name: whole(part) for name, part in parts.items() if part is not None}


@worded()
def prepare(recipe: Recipe, streams: Streams | None = None) -> Setup:
    """Load the data and build the model of `recipe`. Seeds torch's global generator, from which weights and dropout are drawn.

    Arguments:
        recipe: what will run.
        streams: what `open_streams` gives for it, where that is there already.

    Raises:
        InputError: the data is not to be had, or model, rules, hooks, data and device do not fit together.
        Failed: there is no memory left for them.
    """
    device = devices.choose_device(recipe.train.device)
    if recipe.train.accumulate > recipe.data.batch_size:
        what = f"train.accumulate={recipe.train.accumulate} can not divide a batch of {recipe.data.batch_size} images"
        raise InputError(f"{what}: lower it, or raise data.batch_size")
    devices.set_up(recipe, device)
    streams = open_streams(recipe) if streams is None else streams
    dataset, train = streams.dataset, streams.train
    recipe = resolve(with_data(recipe, loader=streams.loader), dataset)

    torch.manual_seed(recipe.seed)
    model, plain, report = _converted(recipe, dataset, device)
    autocast = devices.autocast(recipe.train.precision, device)
    first = next(iter(train)).split(recipe.train.accumulate, train.view.world)[0]
    idle = try_on(model, recipe.model.name, first, dataset.classes, autocast)
    try_smallest_pass(model, recipe, train, autocast)
    wrapped = distributed.wrap(model, recipe.train.distributed, device)
    optimizer = make_optimizer(model, recipe.optim, scaled=recipe.train.precision == "fp16")
    average = None if plain is None or recipe.train.ema is None else _average(plain, model, recipe.train.ema, device)
    if distributed.rank() != 0:  # dropout is to differ from rank to rank
        torch.manual_seed(generator_seed(recipe.seed, f"rank {distributed.rank()}"))
    setup = Setup(
        recipe=recipe,
        choices=streams.choices,
        device=device,
        train=train,
        validation=streams.validation,
        test=streams.test,
        model=model,
        wrapped=wrapped,
        forward=cast(Any, torch.compile(wrapped, dynamic=False)) if recipe.train.compile else wrapped,
        report=report,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, recipe.schedule, epochs=recipe.train.epochs, steps=len(train)),
        direct=bool(passes_of(model)),
        hooks=_attach(recipe, model, optimizer, total_steps=recipe.train.epochs * len(train)),
        autocast=autocast,
        scaler=devices.scaler(recipe.train.precision, device),
        average=average,
    )
    for doubt in _doubts(setup, idle) if distributed.rank() == 0 else ():
        warnings.warn(doubt, Doubtful, stacklevel=2)
    return setup


def _doubts(setup: Setup, idle: Sequence[str]) -> Iterator[str]:
    """What of the recipe does nothing: its rules, where all are `idle`, and hooks that begin after the run's last step."""
    if idle:
        what = f"only {', '.join(idle)} has a rule" if len(idle) == 1 else f"only {', '.join(idle)} have rules"
        yield f"{what}, and sends no error to the images below: the run learns as by backpropagation"
    if not setup.report.converted and not any((entry.match, entry.rule) == ("*", "bp") for entry in setup.recipe.feedback):
        yield "no layer has a rule: the run learns as by backpropagation, and [{match: '*', rule: bp}] says so"
    whole = setup.recipe.train.epochs * len(setup.train)
    for entry, (hook, _) in zip(setup.recipe.hooks, setup.hooks.hooks if setup.hooks else (), strict=True):
        if (first := hook.begins(whole)) > setup.steps:
            what = f"hook {entry.name!r} does nothing: it begins at step {first:,}"
            yield f"{what}, and train.max_steps ends the run after {setup.steps:,}"


def _converted(recipe: Recipe, dataset: Dataset, device: torch.device) -> tuple[nn.Module, nn.Module | None, Report]:
    """The network, converted; the same without rules where an average of its weights is asked for; the report."""
    shape = seen_shape(recipe, dataset)
    model = models.build_for_images(recipe.model.name, shape, dataset.classes, **recipe.model.options)
    if recipe.train.sync_batchnorm:
        model = distributed.sync_batchnorm(model, device)
    plain = None if recipe.train.ema is None else copy.deepcopy(model)
    report = convert(model, {f.match: {"rule": f.rule, **f.options} for f in recipe.feedback}, seed=recipe.seed)
    # Parameters that are to be sharded have to be contiguous; images that are not are enough for convolutions.
    sharded = distributed.shards(recipe.train.distributed)
    memory_format = torch.channels_last if recipe.train.channels_last and not sharded else torch.preserve_format
    for module in (model, plain):
        if module is not None:
            cast(Any, module).to(device, memory_format=memory_format)
    return model, plain, report


def _average(plain: nn.Module, model: nn.Module, decay: float, device: torch.device) -> Average:
    if distributed.is_sharded(model):
        distributed.shard(plain, device)
    return Average(plain, model, decay)


def _attach(recipe: Recipe, model: nn.Module, optimizer: Optimizer, total_steps: int) -> Attachment | None:
    if not recipe.hooks and not any(rule.learns for rule in feedback_rules(model).values()):
        return None
    given = [{"name": hook.name, **({"match": hook.match} if hook.match else {}), **hook.options} for hook in recipe.hooks]
    return attach(model, optimizer, *given, total_steps=total_steps, seed=recipe.seed)
