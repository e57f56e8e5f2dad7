from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data import Stream
from fahooks.data.memory import MemoryStream
from fahooks.recipe import Recipe, Source, load
from fahooks.training.loop import Result, train
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare

TINY = """\
name: tiny
model: {name: paper/mnist}
feedback: [{match: "*", rule: fa}]
data: {dataset: digits, batch_size: 32, validation: 60, limit: 220}
optim: {name: adam, lr: 5e-4}
schedule: {name: step, every: 2, gamma: 0.1}
train: {epochs: 3, device: cpu, threads: 1}
probes: {every: 4}
seed: 0
"""
SOURCE = Source("tiny.yaml", TINY)


def stored(stream: Stream) -> torch.Tensor:
    """The pixels that the memory loader holds."""
    assert isinstance(stream, MemoryStream)
    return stream.pixels


@pytest.fixture(autouse=True)
def terminal_signals() -> Iterator[None]:
    """Signals as a terminal has them: what a shell starts in the background ignores Ctrl-C, and what nohup starts SIGHUP."""
    heeded = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny() -> Callable[..., Recipe]:
    """The tiny recipe with overrides."""
    return lambda *overrides: load(SOURCE, overrides)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[RunDirectory, Result]]:
    """Train the tiny recipe with overrides in a fresh folder of the given name."""

    def go(name: str, *overrides: str) -> tuple[RunDirectory, Result]:
        recipe = load(SOURCE, overrides)
        setup = prepare(recipe)
        directory = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path / name, overrides=overrides)
        return directory, train(setup, directory)

    return go


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that make a recipe learn from a folder of 40 images, of which it skips 0, 8, 16, 24 and 32, which are damaged."""
    for number in range(40):
        file = tmp_path / "mine" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 + 5 * number).save(file)
        if number % 8 == 0:
            file.write_bytes(b"damaged")
    options = "data.dataset_options={path: mine, size: 8, channels: 1, test: 0.5}"
    changes = ("data.validation=10", "data.limit=null", "data.corrupt=skip")
    return ("data.dataset=imagefolder", options, f"data.root={tmp_path}", *changes)


@pytest.fixture(autouse=True)
def _a_test_leaves_the_generator_and_the_threads_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


@pytest.fixture
def in_tmp(tmp_path: Path) -> Iterator[Path]:
    """Run the test in a folder of its own."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
