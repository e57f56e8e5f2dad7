"""Evaluating a run that is there: its best or its last weights, on its own images or on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor

from fahooks.data import Stream
from fahooks.plugins import InputError
from fahooks.recipe import Recipe, load, read_file
from fahooks.training import checkpoint
from fahooks.training.checkpoint import Checkpoints
from fahooks.training.failures import worded
from fahooks.training.loop import measure
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import Setup, prepare
from fahooks.training.streams import divide, load_dataset, open_streams
from fahooks.training.trial import UnfitModel

Weights = Literal["best", "last"]

# Keys of data that say where images come from, and not which they are.
WHERE = ("root", "download", "loader", "loader_options")
MAY_CHANGE = ("data", "train.device", "train.threads")


@dataclass(frozen=True)
class Evaluation:
    """What a run's weights are worth.

    Attributes:
        recipe: of the run, on the images that were evaluated.
        weights: which of its weights.
        step: optimizer steps that the last weights had taken; None for the best ones.
        validation: loss (mean cross-entropy), error (percent), valid images, and images that were skipped, of the validation
            split.
        test: the same of the test set.
    """

    recipe: Recipe
    weights: Weights
    step: int | None
    validation: dict[str, float]
    test: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        about = {"recipe": self.recipe.name, "dataset": self.recipe.data.dataset, "weights": self.weights, "step": self.step}
        return {**about, "validation": self.validation, "test": self.test}


@worded()
def evaluate_run(path: Path, weights: Weights = "best", overrides: Sequence[str] = ()) -> Evaluation:
    """Validation and test error of a run. Nothing is written.

    Images are normalised as those that the run was trained on, also where `overrides` name others.

    Arguments:
        path: its directory; it need not be finished.
        weights: those with the lowest validation error, or those of the newest checkpoint.
        overrides: "dotted.key=value" each, of data, train.device and train.threads.

    Raises:
        InputError: there is no such run, its files are damaged, or the model does not run on the images.
        Failed: there is no memory left.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
            raise InputError(
                f"an evaluation may change {', '.join(MAY_CHANGE)}, and no other key of a run (got --set {override})"
            )
    run = RunDirectory(path)
    if not run.begun:
        raise InputError(f"{str(path)!r} is no run directory: it has no resolved.yaml")
    source = read_file(path / "resolved.yaml")
    trained, asked = load(source), load(source, overrides)
    here = {"data": trained.data.model_copy(update={key: getattr(asked.data, key) for key in WHERE}), "train": asked.train}
    own = trained.model_copy(update=here)
    try:
        setup = prepare(asked, None if own.data == asked.data else open_streams(asked, normalised_by=_statistics(trained, own)))
    except UnfitModel as error:
        advice = f"name images like those that it was trained on, {trained.data.dataset}"
        raise InputError(f"{error.fault}; {advice}") from error
    step = _load(run, weights, setup, trained)
    with setup.train, setup.validation, setup.test:
        validation, test = _measured(setup, setup.validation, "validation"), _measured(setup, setup.test, "test")
    return Evaluation(setup.recipe, weights, step, validation, test)


def _measured(setup: Setup, stream: Stream, name: str) -> dict[str, float]:
    """What `measure` finds, and how many images of the split it did not, since they can not be decoded."""
    found = measure(setup, stream, name)
    return {**found, "skipped": stream.images - found["images"]}


def _statistics(trained: Recipe, moved: Recipe) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the images that `trained` learned from, `moved` or where they were."""
    try:
        try:
            dataset = load_dataset(moved)
        except InputError:  # it is the other images alone that lie there
            dataset = load_dataset(trained)
        return divide(trained, dataset).train.statistics(trained.data.corrupt)
    except InputError as error:
        raise InputError(f"images are normalised as those that were trained on, and of these {error}") from error


def _load(run: RunDirectory, weights: Weights, setup: Setup, trained: Recipe) -> int | None:
    """Put the weights of `run` into what `setup` evaluates; the steps they had taken, for the last ones."""
    if weights == "best":
        if not run.best.is_file():
            raise InputError(f"{str(run.path)!r} has no best weights yet: they come with its first epoch, or take --weights last")
        try:
            checkpoint.load_weights(run.best, setup.evaluated)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise InputError(
                f"{str(run.best)!r} is damaged, or of another model: {' '.join(str(error).split())[:300]}"
            ) from error
        return None
    path, state = Checkpoints(run.checkpoints, trained.model_dump(mode="json")).newest()
    if path is None:
        raise InputError(f"{str(run.path)!r} has no checkpoint")
    try:
        for name in ("model", "average"):
            if name in setup.parts:
                setup.parts[name].load_state_dict(state["parts"][name])
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{str(path)!r} is of another model: {' '.join(str(error).split())[:300]}") from error
    return state["progress"]["step"]
