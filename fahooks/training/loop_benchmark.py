"""What the training loop itself costs: its images per second beside those of a minimal loop, written by hand.

All contestants live in one process, each with a model, an optimizer and images of its own, and take turns, an epoch each, every
other round backwards. A second copy of the minimal loop, the A/A control, shows what a ratio is worth on this machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from fahooks.benchmark import Ratio
from fahooks.plugins import InputError
from fahooks.probes import Probe
from fahooks.recipe import Recipe
from fahooks.training.checkpoint import Checkpoints, Progress
from fahooks.training.loop import Sitting, train_epoch
from fahooks.training.progress import Display
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import Setup, prepare
from fahooks.training.stopping import Stop

MINIMAL = "minimal loop"
CONTROL = "minimal loop again"
OURS = "fahooks train"


@dataclass(frozen=True)
class Speed:
    """How fast a contestant trains.

    Attributes:
        name: `MINIMAL`, `CONTROL` or `OURS`.
        images: a second, by each clock: "wall", and "cpu", time of all threads of the process. The median over rounds.
        ratios: of this speed and that of the minimal loop, by clock; quartiles over rounds.
    """

    name: str
    images: dict[str, float]
    ratios: dict[str, Ratio]


def compare(recipe: Recipe, *, rounds: int = 10) -> list[Speed]:
    """Train epoch by epoch with the loop of `fahooks train` and with a minimal one, on the same model, data and device.

    Only training is timed: no validation, no checkpoint. Probes are off.

    Arguments:
        recipe: what to train; it may ask for nothing that the minimal loop does not know.
        rounds: epochs of each that are timed, after one that is not.

    Returns:
        The minimal loop, its second copy, and the loop of `fahooks train`.

    Raises:
        InputError: fewer than two rounds, or the recipe asks for accumulation, clipping, smoothing, an average, a GradScaler, or
            another loader than memory.
    """
    if rounds < 2:
        raise InputError(f"rounds must be at least 2, got {rounds}")
    recipe = recipe.model_copy(update={"probes": recipe.probes.model_copy(update={"every": None})})
    with ExitStack() as opened:
        ours = opened.enter_context(_sitting(prepare(recipe)))
        _check_plain(ours.setup)
        minimal, control = prepare(recipe), prepare(recipe)
        epochs: dict[str, Callable[[int], object]] = {
            MINIMAL: lambda epoch: minimal_epoch(minimal, epoch),
            CONTROL: lambda epoch: minimal_epoch(control, epoch),
            OURS: lambda epoch: _our_epoch(ours, epoch),
        }
        times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in epochs}
        for number in range(rounds + 1):
            order = list(epochs) if number % 2 else list(reversed(epochs))
            for name in order:
                wall, cpu = _timed(lambda name=name, number=number: epochs[name](number + 1), ours.setup.device)
                if number:
                    times[name]["wall"].append(wall)
                    times[name]["cpu"].append(cpu)
    images = ours.setup.train.images
    return [
        Speed(
            name=name,
            images={clock: images / statistics.median(seconds) for clock, seconds in taken.items()},
            ratios={clock: _ratio(times[MINIMAL][clock], seconds) for clock, seconds in taken.items()},
        )
        for name, taken in times.items()
    ]


def minimal_epoch(setup: Setup, epoch: int) -> None:
    """An epoch as a script would have it: the images lie on the device, a permutation says which come next."""
    model, optimizer, stream = setup.forward, setup.optimizer, setup.train
    setup.model.train()
    pixels, labels = stream.pixels, stream.labels  # pyright: ignore[reportAttributeAccessIssue]  (of the memory loader)
    for index in torch.randperm(len(labels)).to(labels.device).split(stream.view.batch_size):
        images = (stream.view.augment.train(pixels[index], epoch, index).float() - stream.mean) / stream.std
        with setup.autocast:
            loss = F.cross_entropy(model(images), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if labels.device.type == "cuda":
        torch.cuda.synchronize()


def _our_epoch(sitting: Sitting, epoch: int) -> None:
    train_epoch(sitting, epoch)
    sitting.progress.finish_epoch()


@contextmanager
def _sitting(setup: Setup) -> Iterator[Sitting]:
    """A run of its own, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        checkpoints = Checkpoints(run.checkpoints, {})
        with (
            Stop() as stop,
            SummaryWriter(str(run.tensorboard)) as board,
            Display(setup.recipe.name, Console(quiet=True), steps=1) as display,
        ):
            now = time.perf_counter()
            yield Sitting(setup, run, Progress(), checkpoints, Probe(setup.model), board, display, stop, now, now)


def _check_plain(setup: Setup) -> None:
    config = setup.recipe.train
    asked = {
        "data.loader": setup.recipe.data.loader != "memory",
        "train.accumulate": config.accumulate > 1,
        "train.clip_norm": config.clip_norm is not None,
        "train.label_smoothing": config.label_smoothing > 0,
        "train.ema": config.ema is not None,
        "train.precision=fp16": config.precision == "fp16",
        "train.channels_last": config.channels_last,
    }
    for key, unknown in asked.items():
        if unknown:
            raise InputError(f"the minimal loop does not know what the recipe asks for with {key}: leave it away, by --set")


def _timed(epoch: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that an epoch takes: by the clock on the wall, and of all threads of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    epoch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _ratio(minimal: list[float], seconds: list[float]) -> Ratio:
    return Ratio(*statistics.quantiles([theirs / ours for theirs, ours in zip(minimal, seconds, strict=True)], n=4))
