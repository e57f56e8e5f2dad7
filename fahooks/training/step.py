"""One step of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fahooks.data import Batch
from fahooks.rules import IGNORED, targets
from fahooks.training.distributed import reducing, total
from fahooks.training.setup import Setup


class Outcome(NamedTuple):
    """What a pass found with the weights from before its step: tensors, for whoever reads a number makes the host wait.

    Attributes:
        losses: of this rank's examples, added up, float32 [].
        answers: the class that each was taken for, int64 [N].
        labels: its own class, int64 [N], IGNORED where it does not count.
    """

    losses: Tensor
    answers: Tensor
    labels: Tensor


def take_step(setup: Setup, batch: Batch) -> list[Outcome]:
    """One step of the optimizer, on the gradient of the mean loss over what can be learned from of a batch, on all ranks.

    Arguments:
        setup: what `prepare` made.
        batch: what to learn from, in `train.accumulate` passes.

    Returns:
        What each pass found.
    """
    config, view = setup.recipe.train, setup.train.view
    outcomes = []
    count = counted(setup, batch)
    passes = batch.split(config.accumulate, view.world)
    all_valid = view.world == 1 and view.corrupt == "refuse" and batch.count == len(batch.labels)

    setup.optimizer.zero_grad()
    for number, part in enumerate(passes, 1):
        labels = part.labels if all_valid else known(part)
        with reducing(setup.wrapped, last=number == len(passes)):
            loss, summed, logits = loss_of(setup, setup.forward, part.images, labels, count=count)
            loss.backward()
        outcomes.append(Outcome(summed.detach(), logits.argmax(1), labels))

    if config.clip_norm is not None:
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), config.clip_norm)
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()
    setup.schedule.step()
    if setup.average is not None:
        setup.average.update()
    return outcomes


def loss_of(
    setup: Setup, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, count: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What one forward pass gives.

    Arguments:
        setup: what `prepare` made.
        model: setup.model, or setup.forward.
        images: float32 [N, C, H, W].
        labels: int64 [N], IGNORED where an example does not count.
        count: how many examples the step learns from, in all passes, on all ranks; a number, or a tensor [].

    Returns:
        What to take the gradient of: the part of these examples in the mean loss, times the scaler's factor. The losses added up.
        The logits [N, classes].
    """
    # Ranks' gradients are averaged: each rank's loss counts as often as there are ranks.
    share = setup.train.view.world / (count.double().clamp(min=1) if isinstance(count, Tensor) else max(1, count))
    if setup.scaler.is_enabled():
        # The factor stays on the device. drtp sends no gradient, and has to be told what the loss is multiplied by.
        share = setup.scaler.scale(torch.ones((), device=setup.device)) * share
    told = targets(setup.model, labels, scale=share * len(labels)) if setup.direct else nullcontext()
    with setup.autocast, told:
        logits = model(images)
        summed = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=setup.recipe.train.label_smoothing)
    return summed * share, summed, logits


def counted(setup: Setup, batch: Batch) -> int | Tensor:
    """How many examples a step learns from, over all ranks, int64 []: those of the batch but for files that were skipped.

    All ranks have to call it. Where no file is skipped it is known beforehand, and no rank waits for another.
    """
    return batch.count if setup.train.view.corrupt == "refuse" else total(batch.valid.sum())


def known(batch: Batch) -> Tensor:
    """The labels of a batch, int64 [N], IGNORED where an example does not count."""
    return batch.labels.masked_fill(~batch.valid, IGNORED)
