"""The images of a recipe: loaded, divided into three sets, and opened by its loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fahooks.data import Augment, Dataset, Examples, Loader, Split, Stream, View, load, split
from fahooks.plugins import InputError, loaders
from fahooks.recipe import Recipe
from fahooks.training import distributed
from fahooks.training.device import choose_device
from fahooks.training.failures import worded
from fahooks.training.resolution import choose_for, seen_shape, with_data

EVALUATION_BATCH = 500
SMALL_IMAGE = 3 * 64 * 64


@dataclass(frozen=True)
class Streams:
    """The images of a recipe, opened.

    Attributes:
        dataset: what they are taken from.
        loader: what opened them.
        choices: why it was that one, where the recipe left the choice, by dotted key.
        train: the images to learn from.
        validation: the images that choose the best epoch.
        test: the images that only the finished model sees.
    """

    dataset: Dataset
    loader: str
    choices: Mapping[str, str]
    train: Stream
    validation: Stream
    test: Stream


@worded()
def open_streams(
    recipe: Recipe,
    *,
    dataset: Dataset | None = None,
    normalised_by: tuple[Tensor, Tensor] | None = None,
    write: bool = True,
) -> Streams:
    """Load the images of `recipe`, divide them, and open the three sets.

    Arguments:
        recipe: says which, and how they are seen.
        dataset: what `load_dataset` gives for it, where that is there already.
        normalised_by: mean and standard deviation of each channel, float32 [C] each; by default those of the images that are
            trained on.
        write: let the loader write the files that it reads, where they are not there.

    Raises:
        InputError: the images are not to be had, or the loader can not feed them.
        Failed: there is no memory left for them.
    """
    if dataset is None:
        dataset = load_dataset(recipe)
    choices = {}
    if recipe.data.loader == "auto":
        name, reason = choose_for(recipe, dataset)
        choices["data.loader"] = f"{name}: {reason}"
        recipe = with_data(recipe, loader=name)
    # Large images do not fit into memory by the hundreds; a batch that can be trained on can be evaluated.
    small = math.prod(seen_shape(recipe, dataset)) <= SMALL_IMAGE
    loader, parts = build_loader(recipe), divide(recipe, dataset)
    training = training_view(recipe, parts.train, choose_device(recipe.train.device), normalised_by)
    evaluation = replace(training, training=False, batch_size=EVALUATION_BATCH if small else recipe.data.batch_size)
    views = ((parts.train, training), (parts.validation, evaluation), (parts.test, evaluation))
    with distributed.rank_0_first():
        for examples, _ in views if write else ():
            loader.prepare(examples, corrupt=recipe.data.corrupt)
    train, validation, test = (loader.open(examples, view) for examples, view in views)
    return Streams(dataset, recipe.data.loader, choices, train, validation, test)


class SharedStreams:
    """What several runs read, one after the other, opened anew only where one looks at other images than the one before it.

    No more than one recipe's images are held at a time.
    """

    def __init__(self) -> None:
        self._dataset: tuple[str, Dataset] | None = None
        self._streams: tuple[str, Streams] | None = None

    def dataset(self, recipe: Recipe) -> Dataset:
        """As `load_dataset`."""
        key = data_key(recipe)
        if self._dataset is None or self._dataset[0] != key:
            self.close()  # before the others take memory
            self._dataset = None
            self._dataset = key, load_dataset(recipe)
        return self._dataset[1]

    def open(self, recipe: Recipe) -> Streams:
        """As `open_streams`."""
        dataset = self.dataset(recipe)
        key = repr((recipe.data, recipe.seed, recipe.train.device, recipe.train.channels_last))
        if self._streams is None or self._streams[0] != key:
            self.close()
            self._streams = key, open_streams(recipe, dataset=dataset)
        self._streams[1].train.set_epoch(0)  # the run before may have left it at the end of an epoch
        return self._streams[1]

    def close(self) -> None:
        """Give back what the streams hold."""
        if self._streams is not None:
            streams, self._streams = self._streams[1], None
            for stream in (streams.train, streams.validation, streams.test):
                stream.close()


def data_key(recipe: Recipe) -> str:
    """Equal for recipes that `load_dataset` gives the same for."""
    data = recipe.data
    return repr((data.dataset, data.dataset_options, data.root, data.download))


@worded()
def load_dataset(recipe: Recipe) -> Dataset:
    """What `recipe` trains on. Of several processes rank 0 loads it before the others do: it may have to be downloaded.

    Raises:
        InputError: the files are neither there nor to be had.
        Failed: there is no memory left for them.
    """
    data = recipe.data
    with distributed.rank_0_first():
        return load(data.dataset, root=data.root, download=data.download, **data.dataset_options)


def divide(recipe: Recipe, dataset: Dataset) -> Split:
    """The three sets of images of `recipe`.

    Raises:
        InputError: one of them would be empty.
    """
    return split(dataset, validation=recipe.data.validation, limit=recipe.data.limit, seed=recipe.seed)


def training_view(
    recipe: Recipe, examples: Examples, device: torch.device, normalised_by: tuple[Tensor, Tensor] | None = None
) -> View:
    """How `recipe` looks at the images that it trains on, by default normalised by their own mean and standard deviation.

    Raises:
        InputError: a file can not be decoded, or what they are to be normalised by has another number of channels.
    """
    mean, std = normalised_by or examples.statistics(recipe.data.corrupt)
    if len(mean) != examples.shape[0]:
        channels = f"{examples.shape[0]} {'channel' if examples.shape[0] == 1 else 'channels'}"
        raise InputError(
            f"{examples.name} has images of {channels}, and they are normalised as images of {len(mean)}: name others like those"
        )
    return View(
        batch_size=recipe.data.batch_size,
        training=True,
        mean=mean,
        std=std,
        seed=recipe.seed,
        device=device,
        channels_last=recipe.train.channels_last,
        augment=Augment(recipe.data.augment, seed=recipe.seed),
        corrupt=recipe.data.corrupt,
        rank=distributed.rank(),
        world=distributed.world(),
    )


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
