"""A dry run: what a recipe would do here and what it would cost, from two steps of training and one of evaluation."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fahooks.plugins import InputError
from fahooks.recipe import find, load
from fahooks.training.loop import measure
from fahooks.training.resolution import with_data
from fahooks.training.setup import Setup, prepare
from fahooks.training.step import take_step
from fahooks.training.streams import open_streams


@dataclass(frozen=True)
class Cost:
    """What a recipe costs on this machine.

    Attributes:
        setup: what was tried; its model has taken two steps.
        loss: mean cross-entropy of the first batch.
        step: seconds of the second step of training, its batch included.
        evaluation: seconds of a batch of evaluation.
        evaluated: images in that batch.
        peak: bytes; on a GPU those that torch held there at most, else those of the whole process. Of several, those of this one.
    """

    setup: Setup
    loss: float
    step: float
    evaluation: float
    evaluated: int
    peak: int

    @property
    def seconds(self) -> float:
        """About what a whole run takes: its steps, a validation an epoch, and two tests; no probes, no checkpoints."""
        setup = self.setup
        epochs = -(-setup.steps // len(setup.train))
        return setup.steps * self.step + (epochs * len(setup.validation) + 2 * len(setup.test)) * self.evaluation

    def lines(self) -> list[tuple[str, str]]:
        """What there is to say beside the layers, as pairs of a word and a sentence."""
        setup, recipe = self.setup, self.setup.recipe
        images = "x".join(map(str, setup.train.examples.shape))
        batch = min(recipe.data.batch_size, setup.train.images)
        counts = f"{setup.train.images:,} training, {setup.validation.images:,} validation and {setup.test.images:,} test images"
        own, states = _bytes(setup.model.parameters()), (setup.optimizer.state.values())
        optimizer = _bytes(value for state in states for value in state.values())
        held = f"weights {_size(own)}, feedback {_size(setup.report.memory_bytes)}, optimizer {_size(optimizer)}"
        where = "of the GPU" if setup.device.type == "cuda" else "of this process"
        speed = f"{batch / self.step:,.0f} images/s in training, {self.evaluated / self.evaluation:,.0f} in evaluation"
        return [
            ("data", f"{recipe.data.dataset}, {counts} of {images} (CxHxW)"),
            ("loader", setup.choices.get("data.loader", recipe.data.loader)),
            ("steps", f"{setup.steps:,}, of {batch} images, {len(setup.train):,} an epoch"),
            ("loss", f"{self.loss:.4g} at the first step"),
            ("speed", f"{speed}, on {_device(setup)}"),
            ("memory", f"{held}; peak {_size(self.peak)} {where}"),
            ("time", f"about {_duration(self.seconds)}, from the second step; probes and checkpoints come on top"),
        ]


def dry_run(name: str, overrides: Sequence[str] = ()) -> Cost:
    """Prepare the recipe called `name`, take two steps and evaluate one batch. Nothing is written or downloaded.

    Arguments:
        name: a shipped recipe or a file.
        overrides: "dotted.key=value" each.

    Raises:
        InputError: recipe or data are not right, or files that its loader reads are not written yet.
    """
    recipe = load(find(name), overrides)
    try:
        here = with_data(recipe, download=False)
        setup = prepare(here, open_streams(here, write=False))
    except InputError as error:
        note = "; a dry run downloads nothing" if recipe.data.download and "download" in str(error) else ""
        raise InputError(f"{error}{note}") from error
    with setup.train, setup.validation, setup.test:
        if setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        setup.model.train()
        setup.train.set_epoch(1)
        # Where an epoch has one batch, the next epoch gives the second one.
        batches = itertools.chain.from_iterable(itertools.repeat(setup.train))
        first = next(batches)
        losses = sum(outcome.losses.item() for outcome in take_step(setup, first))
        step = _timed(setup, lambda: take_step(setup, next(batches)))
        evaluated = next(iter(setup.validation))
        evaluation = _timed(setup, lambda: measure(setup, [evaluated], "validation"))
    cuda = setup.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(setup, losses / max(1, int(first.valid.sum())), step, evaluation, evaluated.count, peak)


def _timed(setup: Setup, work: Callable[[], Any]) -> float:
    """The seconds that `work` takes, until the device is done with it."""
    _wait(setup)
    begun = time.perf_counter()
    work()
    _wait(setup)
    return time.perf_counter() - begun


def _wait(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.synchronize()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def _device(setup: Setup) -> str:
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    processes = setup.train.view.world
    return name if processes == 1 else f"{name} for each of {processes} processes"


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
