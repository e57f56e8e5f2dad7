"""Recipes with nothing left to choose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fahooks import models
from fahooks.data import Augment, Dataset, choose_loader
from fahooks.plugins import Entry, augmentations, datasets, hooks, loaders, rules
from fahooks.plugins import models as registered
from fahooks.recipe import Recipe, left_out, own_options, with_defaults


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
    recipe = with_data(
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


def choose_for(recipe: Recipe, dataset: Dataset) -> tuple[str, str]:
    """The loader that suits `recipe` on this machine, and why."""
    gpu = recipe.train.device != "cpu" and torch.cuda.is_available()
    augment = Augment(recipe.data.augment)
    return choose_loader(dataset, augment, limit=recipe.data.limit, device="cuda" if gpu else "cpu")


def seen_shape(recipe: Recipe, dataset: Dataset) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images of `dataset` as the model sees them.

    Raises:
        InputError: they do not go through the augmentations.
    """
    return Augment(recipe.data.augment).shape(dataset.shape)


def with_data(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values of `data`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=values)})


def _written_out(options: dict[str, Any], entry: Entry) -> dict[str, Any]:
    return {**options, **left_out(options, entry)}
