"""What a run needs before its first step: images on the device, the converted model, optimizer and schedule."""

from __future__ import annotations

import copy
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
from fahooks.data import Augment, Batch, Dataset, Loader, Split, Stream, View, choose_loader, load, split
from fahooks.hooks import Attachment, attach
from fahooks.observation import as_found
from fahooks.plugins import Entry, InputError, augmentations, datasets, hooks, loaders, rules
from fahooks.plugins import models as registered
from fahooks.recipe import Recipe, left_out, own_options, with_defaults
from fahooks.rules import targets
from fahooks.surgery import Report, convert, feedback_rules
from fahooks.surgery.choice import generator_seed
from fahooks.training import distributed
from fahooks.training.average import Average
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
        wrapped: what a forward pass in training calls: the model, or what makes it one of several.
        forward: the same, or its compiled version.
        report: what the conversion did.
        optimizer: for every parameter of the model that requires a gradient.
        schedule: moved on at every step.
        hooks: what acts at every step of the optimizer; None where nothing does.
        autocast: the context that every forward pass runs in.
        scaler: of the loss; enabled for float16 only.
        average: of the weights over the steps; None where the recipe asks for none.
    """

    recipe: Recipe
    choices: dict[str, str]
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


def prepare(recipe: Recipe, *, write: bool = True) -> Setup:
    """Load the data and build the model of `recipe`. Seeds torch's global generator, from which weights and dropout are drawn.

    Arguments:
        recipe: what will run.
        write: let the loader write the files that it reads, where they are not there.

    Raises:
        InputError: the data is not to be had, or model, rules, hooks, data and device do not fit together.
    """
    device = _device(recipe.train.device)
    if recipe.train.accumulate > recipe.data.batch_size:
        what = f"train.accumulate={recipe.train.accumulate} can not divide a batch of {recipe.data.batch_size} images"
        raise InputError(f"{what}: lower it, or raise data.batch_size")
    _set_precision(recipe.train.precision, device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    with distributed.rank_0_first():
        dataset = load_dataset(recipe)
    choices = {}
    if recipe.data.loader == "auto":
        loader, reason = choose_for(recipe, dataset)
        choices["data.loader"] = f"{loader}: {reason}"
        recipe = _with_data(recipe, loader=loader)
    recipe = resolve(recipe, dataset)
    parts = split(dataset, validation=recipe.data.validation, limit=recipe.data.limit, seed=recipe.seed)
    train, validation, test = _streams(recipe, parts, device, write=write)

    torch.manual_seed(recipe.seed)
    shape = seen_shape(recipe, dataset)
    model = models.build_for_images(recipe.model.name, shape, dataset.classes, **recipe.model.options)
    # The average needs no rules: a copy from before the conversion is the plain model.
    plain = None if recipe.train.ema is None else copy.deepcopy(model)
    report = convert(model, {f.match: {"rule": f.rule, **f.options} for f in recipe.feedback}, seed=recipe.seed)
    memory_format = torch.channels_last if recipe.train.channels_last else torch.preserve_format
    model = cast(Any, model).to(device, memory_format=memory_format)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)
    autocast = torch.autocast(device.type, precision, enabled=precision is not None)
    _try(model, recipe.model.name, next(iter(train)), dataset.classes, autocast)
    _try_smallest_pass(model, recipe, train, autocast)
    wrapped = distributed.wrap(model, recipe.train.distributed, device)
    _check_whole(recipe, model)
    optimizer = make_optimizer(model, recipe.optim)
    average = None
    if plain is not None and recipe.train.ema is not None:
        plain = cast(Any, plain).to(device, memory_format=memory_format)
        if distributed.is_sharded(model):
            distributed.shard(plain, device)
        average = Average(plain, model, recipe.train.ema)
    if distributed.rank() != 0:  # dropout is to differ from rank to rank
        torch.manual_seed(generator_seed(recipe.seed, f"rank {distributed.rank()}"))
    return Setup(
        recipe=recipe,
        choices=choices,
        device=device,
        train=train,
        validation=validation,
        test=test,
        model=model,
        wrapped=wrapped,
        forward=cast(Any, torch.compile(wrapped)) if recipe.train.compile else wrapped,
        report=report,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, recipe.schedule, epochs=recipe.train.epochs, steps=len(train)),
        hooks=_attach(recipe, model, optimizer, total_steps=recipe.train.epochs * len(train)),
        autocast=autocast,
        scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        average=average,
    )


def load_dataset(recipe: Recipe) -> Dataset:
    """What `recipe` trains on.

    Raises:
        InputError: the files are neither there nor to be had.
    """
    data = recipe.data
    return load(data.dataset, root=data.root, download=data.download, **data.dataset_options)


def choose_for(recipe: Recipe, dataset: Dataset) -> tuple[str, str]:
    """The loader that suits `recipe` on this machine, and why."""
    gpu = recipe.train.device != "cpu" and torch.cuda.is_available()
    augment = Augment(recipe.data.augment)
    return choose_loader(dataset, augment, limit=recipe.data.limit, device="cuda" if gpu else "cpu")


def resolve(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with nothing left to choose, so that it is the same run anywhere.

    `loader: auto` is the one that `choose_for` names, data.root is absolute, and the options of dataset, loader, augmentations,
    rules, hooks and model are written out with their defaults, those of the model as they fit the images of `dataset`.

    Raises:
        InputError: the images of `dataset` do not go through the augmentations.
    """
    loader = choose_for(recipe, dataset)[0] if recipe.data.loader == "auto" else recipe.data.loader
    root = os.path.abspath(Path(recipe.data.root).expanduser())
    augment = [
        {name: _written_out(options, augmentations.get(name)) for name, options in step.items()} for step in recipe.data.augment
    ]
    recipe = _with_data(
        recipe,
        dataset_options=_written_out(recipe.data.dataset_options, own_options(datasets.get(recipe.data.dataset))),
        loader=loader,
        loader_options=_written_out(recipe.data.loader_options, loaders.get(loader)),
        root=root,
        augment=augment,
    )
    fitting = models.options_for_images(recipe.model.name, seen_shape(recipe, dataset), dataset.classes)
    model = with_defaults(recipe.model, registered.get(recipe.model.name) if recipe.model.name in registered else None, fitting)
    feedback = [with_defaults(entry, rules.get(entry.rule)) for entry in recipe.feedback]
    attached = [with_defaults(entry, hooks.get(entry.name)) for entry in recipe.hooks]
    return recipe.model_copy(update={"model": model, "feedback": feedback, "hooks": attached})


def _with_data(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=values)})


def _written_out(options: dict[str, Any], entry: Entry) -> dict[str, Any]:
    return {**options, **left_out(options, entry)}


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


def _try_smallest_pass(model: nn.Module, recipe: Recipe, train: Stream, autocast: torch.autocast) -> None:
    """Train on one image where a pass has no more, which batch norm can not do; the model stays as it was.

    Raises:
        InputError: it can not be done.
    """
    size, world = recipe.data.batch_size, train.view.world
    batches = {min(size, train.images), train.images % size or size}
    shares = {count // world // max(1, min(recipe.train.accumulate, count // world)) for count in batches}
    if min(shares) > 1:
        return
    batch = next(iter(train))
    try:
        with as_found(model), autocast, targets(model, batch.labels[:1]):
            model.train()(batch.images[:1])
    except ValueError as error:
        what = (
            f"{train.images:,} images in batches of {size} leave a pass with a single one, on which the model can not be trained"
        )
        raise InputError(
            f"{what} ({' '.join(str(error).split())}): choose another data.batch_size, data.limit or data.validation"
        ) from error


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no GPU here: use train.device=cpu, or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _check_whole(recipe: Recipe, model: nn.Module) -> None:
    """Refuse what needs whole weights where they are sharded.

    Raises:
        InputError: probes, and float16, whose scaler looks for infinite gradients on each rank alone.
    """
    if not distributed.is_sharded(model):
        return
    if recipe.probes.every is not None:
        what = "probes.every measures whole gradients, and train.distributed=fsdp2 shards them"
        raise InputError(f"{what}: use ddp, or --set probes.every=null")
    if recipe.train.precision == "fp16":
        raise InputError("train.precision=fp16 needs whole gradients, and train.distributed=fsdp2 shards them: use bf16, or ddp")


def _set_precision(precision: str, device: torch.device) -> None:
    """Let float32 products be rounded on a GPU, or not: by default torch rounds those of convolutions there.

    Raises:
        InputError: the device knows no such precision.
    """
    if precision == "tf32" and device.type == "cpu":
        raise InputError("train.precision=tf32 is a precision of GPUs, and this runs on the CPU: use fp32, bf16 or fp16")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def build_loader(recipe: Recipe) -> Loader:
    """The loader that `recipe` names; what it writes goes into a folder of its name in data.root, unless an option says where.

    Raises:
        InputError: it does not work here.
    """
    entry = loaders.get(recipe.data.loader)
    if missing := entry.target.available():
        raise InputError(f"data.loader={entry.name} does not work here: {missing}")
    options = dict(recipe.data.loader_options)
    if "folder" in entry.options and options.get("folder") is None:
        options["folder"] = str(Path(recipe.data.root).expanduser() / entry.name)
    return entry.build(**options)


def _streams(recipe: Recipe, parts: Split, device: torch.device, *, write: bool) -> tuple[Stream, Stream, Stream]:
    """Streams of the three sets; all are normalised by the statistics of the images that are trained on."""
    loader = build_loader(recipe)
    mean, std = parts.train.statistics(recipe.data.corrupt)
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
        corrupt=recipe.data.corrupt,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    evaluation = replace(training, training=False, batch_size=EVALUATION_BATCH if small else recipe.data.batch_size)
    views = ((parts.train, training), (parts.validation, evaluation), (parts.test, evaluation))
    with distributed.rank_0_first():
        for examples, _ in views if write else ():
            loader.prepare(examples, corrupt=recipe.data.corrupt)
    train, validation, test = (loader.open(examples, view) for examples, view in views)
    return train, validation, test
