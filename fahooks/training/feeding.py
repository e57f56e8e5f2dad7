"""What `fahooks data` does with a recipe: write what its loader reads, and measure how fast loaders are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fahooks.data import Loader, Split, Stream
from fahooks.data.ffcv.loader import FfcvLoader
from fahooks.data.throughput import Throughput, measure
from fahooks.plugins import Failed, InputError, loaders
from fahooks.recipe import Recipe, find, load
from fahooks.training.device import choose_device
from fahooks.training.resolution import with_data
from fahooks.training.streams import build_loader, divide, load_dataset, training_view


def prepare_data(name: str, overrides: Sequence[str] = ()) -> list[Path]:
    """Write the .beton files of a recipe, unless they are there: one for its training images, one for its test images.

    Arguments:
        name: a shipped recipe or a file; with loader auto, memory or torchvision, files are written as for ffcv.
        overrides: "dotted.key=value" each.

    Returns:
        The files.

    Raises:
        InputError: recipe or data are not right, FFCV is missing, or a file can not be written.
        Failed: writing failed midway.
    """
    recipe = load(find(name), overrides)
    parts, loader = _parts(recipe), _build(recipe, "ffcv")
    assert isinstance(loader, FfcvLoader)
    files = []
    for examples in (parts.train, parts.test):
        loader.prepare(examples, corrupt=recipe.data.corrupt)
        files.append(loader.path(examples))
    return files


def compare_loaders(
    name: str, overrides: Sequence[str] = (), *, only: Sequence[str] = (), rounds: int, seconds: float
) -> tuple[list[Throughput], dict[str, str]]:
    """Measure how fast each loader feeds the training images of a recipe, augmented and normalised.

    Arguments:
        name: a shipped recipe or a file.
        overrides: "dotted.key=value" each.
        only: the loaders to compare; empty for all.
        rounds: how many turns each gets.
        seconds: how long a turn is at least; it ends with an epoch.

    Returns:
        What was measured, and why other loaders were left out, by name.

    Raises:
        InputError: recipe or data are not right, or a loader in `only` does not work here.
    """
    recipe = load(find(name), overrides)
    parts = _parts(recipe)
    view = training_view(recipe, parts.train, choose_device(recipe.train.device))
    opened: dict[str, Stream] = {}
    opening: dict[str, float] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        for loader_name in only or loaders.names():
            try:
                loader = _build(recipe, loader_name)
                loader.prepare(parts.train, corrupt=view.corrupt)
                started = time.perf_counter()
                opened[loader_name] = stack.enter_context(loader.open(parts.train, view))
            except (InputError, Failed) as error:
                if only:
                    raise
                left_out[loader_name] = str(error)
                continue
            next(iter(opened[loader_name]))
            opening[loader_name] = time.perf_counter() - started
        return measure(opened, opening, rounds=rounds, seconds=seconds), left_out


def _parts(recipe: Recipe) -> Split:
    return divide(recipe, load_dataset(recipe))


def _build(recipe: Recipe, name: str) -> Loader:
    """A loader for `recipe`; with the recipe's options where it is the recipe's own."""
    options = recipe.data.loader_options if recipe.data.loader == name else {}
    return build_loader(with_data(recipe, loader=name, loader_options=options))
