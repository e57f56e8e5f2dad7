"""The training images, divided once into those to learn from and those that choose the best epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fahooks.data.datasets import Dataset
from fahooks.data.examples import Examples
from fahooks.data.order import shuffled
from fahooks.plugins import InputError


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of images."""

    train: Examples
    validation: Examples
    test: Examples


def split(dataset: Dataset, *, validation: int | float, limit: int | None, seed: int) -> Split:
    """Take a validation set out of the training images; the test set is left alone.

    Arguments:
        dataset: what to divide.
        validation: a number of images (int) or a fraction of the training images (float between 0 and 1).
        limit: use at most this many training images, the validation images included; None for all.
        seed: which images; equal seeds give equal sets.

    Raises:
        InputError: nothing would be left to train on, or the validation set would be empty.
    """
    order = shuffled(len(dataset.train), "split", seed)[:limit]
    held_out = round(validation * len(order)) if isinstance(validation, float) else validation
    if not 0 < held_out < len(order):
        raise InputError(
            f"data.validation={validation} takes {held_out} of the {len(order)} training images of {dataset.name}: "
            "set it so that at least one image is left on each side"
        )
    train = f"{dataset.name}/train"
    return Split(
        train=Examples(train, dataset.train, order[held_out:]),
        validation=Examples(train, dataset.train, order[:held_out]),
        test=Examples(f"{dataset.name}/test", dataset.test, torch.arange(len(dataset.test))),
    )
