"""`fahooks bench`: what a rule costs, in time and memory, and what the training loop does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fahooks import plugins
from fahooks.plugins import InputError

from .arguments import NUMBERS, RECIPE, SETTINGS, names
from .refusing import refused
from .stopping import importing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fahooks.benchmark import Timing


@click.group()
def bench() -> None:
    """Measure what a rule, or the training loop, costs."""


@bench.command(epilog="Example: fahooks bench step timm/resnet18 --image 32 --rules fa,usf_sn,dfa")
@click.argument("model")
@click.option("--rules", default="all", show_default=True, metavar="NAMES", help="Such as fa,usf_sn.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(1), help="Images a step.")
@click.option("--image", "side", type=click.IntRange(1), help="Height and width of an image.  [default: the model's own]")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2))
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Steps of each that are timed.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="Of torch, on a CPU.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--bf16", is_flag=True, help="Run the forward pass in bfloat16, by autocast.")
@click.option("--channels-last", is_flag=True, help="Keep model and images in that memory format.")
@click.option("--compile", "compiled", is_flag=True, help="Compile every contestant with torch.compile, as one graph.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights, images and feedback matrices.")
@NUMBERS
def step(
    model: str,
    rules: str,
    batch: int,
    side: int | None,
    classes: int,
    rounds: int,
    threads: int,
    device: str,
    bf16: bool,
    channels_last: bool,
    compiled: bool,
    seed: int,
    file: Path | None,
) -> None:
    """Time a training step of MODEL by each rule, beside backpropagation, in one process and in turns.

    MODEL is timm/NAME, torchvision/NAME, a registered name such as paper/mnist, or path/to/file.py:factory. Rows are medians over
    rounds with quartiles. `backprop again` is backpropagation once more: no ratio says more than its own.
    """
    # torch's profiler, which measures memory, reports on itself otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with importing():
        import torch

        from fahooks import benchmark
        from fahooks.training.device import set_threads, tune_allocator

    chosen = plugins.rules.names() if rules == "all" else names("--rules", rules)
    for name in chosen:
        plugins.rules.get(name).build()
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch finds no GPU here")
    set_threads(threads, "--threads")
    if device == "cpu":
        tune_allocator()
    shape, make = _maker(model, side, classes, seed, device, channels_last)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *shape, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    _check_learns(model, make(), images, classes)
    timings = benchmark.compare(
        make, {name: name for name in chosen}, images, labels, rounds=rounds, compiled=compiled, bf16=bf16
    )
    words = [model, f"{batch} images of {'x'.join(map(str, shape))}", f"{rounds} rounds", _where(device, threads)]
    words += [word for word, used in (("bf16", bf16), ("channels last", channels_last), ("compiled", compiled)) if used]
    about = ", ".join([*words, f"torch {torch.__version__}"])
    click.echo(f"{about}\n{_table(timings)}")
    if file is not None:
        document = {"about": about, "timings": [timing.as_dict() for timing in timings]}
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@bench.command()
@RECIPE
@SETTINGS
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(2), help="Epochs of each that are timed.")
def loop(recipe: str, overrides: tuple[str, ...], rounds: int) -> None:
    """Compare the loop of `fahooks train` with a minimal one written by hand: images a second on RECIPE, in turns.

    A ratio is the speed of a loop over that of the minimal one in the same round: medians over rounds with quartiles. `minimal
    loop again` is a second copy: no ratio says more than its own.
    """
    with importing():
        import torch

        from fahooks.recipe import load
        from fahooks.training import loop_benchmark

    speeds = loop_benchmark.compare(load(recipe, overrides), rounds=rounds)
    clocks = list(speeds[0].ratios)
    header = ["loop", *(column for clock in clocks for column in (f"images/s, {clock}", "of the minimal loop's"))]
    rows = [
        [speed.name, *(text for clock in clocks for text in (f"{speed.images[clock]:,.0f}", str(speed.ratios[clock])))]
        for speed in speeds
    ]
    threads = torch.get_num_threads()
    click.echo(f"{recipe}, {rounds} rounds, {_where('cpu', threads)}, torch {torch.__version__}\n{_aligned([header, *rows])}")


def _maker(
    name: str, side: int | None, classes: int, seed: int, device: str, channels_last: bool
) -> tuple[tuple[int, int, int], Callable[[], nn.Module]]:
    """The shape of an image, and what makes the model for such images, with the same weights each time."""
    import torch

    from fahooks import models

    own = models.input_size(models.build(name), name)
    shape = (own[0], side or own[1], side or own[2])

    def make() -> nn.Module:
        torch.manual_seed(seed)
        model = models.build_for_images(name, shape, classes).to(device).train()
        return model.to(memory_format=torch.channels_last) if channels_last else model  # pyright: ignore[reportCallIssue]

    return shape, make


def _check_learns(name: str, model: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse a model that can not take a step on such images."""
    import torch
    from torch.nn.functional import cross_entropy

    batch, *shape = images.shape
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{name!r} has no parameters to train")
    with torch.no_grad():
        with refused(f"{name!r} does not run on {batch} images of shape {tuple(shape)} (--batch and --image set others)"):
            outputs = model(images)
        with refused(f"{name!r} does not return a number for each of {classes} classes (--classes sets how many)"):
            cross_entropy(outputs, torch.full((batch,), classes - 1, device=images.device))


def _where(device: str, threads: int) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU thread{'s' if threads > 1 else ''}"


def _table(timings: list[Timing]) -> str:
    clocks = list(timings[0].milliseconds)
    header = ["rule", *(column for clock in clocks for column in (f"{clock} ms", f"{clock}, of backprop's")), "state", "peak"]
    rows = [
        [
            timing.name,
            *(text for clock in clocks for text in (f"{timing.milliseconds[clock]:.2f}", str(timing.ratios[clock]))),
            _size(timing.state_bytes),
            _size(timing.peak_bytes),
        ]
        for timing in timings
    ]
    return _aligned([header, *rows])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
