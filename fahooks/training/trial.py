"""Trying a model on its images before a run begins; the model stays as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fahooks.data import Batch, Stream
from fahooks.observation import as_found
from fahooks.plugins import InputError, one_line
from fahooks.recipe import Recipe
from fahooks.rules import targets
from fahooks.surgery import feedback_rules
from fahooks.verify import senders


class UnfitModel(InputError):
    """A model does not run on its images.

    Arguments:
        fault: what goes wrong; the message has advice for a new run beside it.
    """

    def __init__(self, fault: str) -> None:
        self.fault = fault
        super().__init__(f"{fault}; name another, or set its options")


def try_on(model: nn.Module, name: str, batch: Batch, classes: int, autocast: torch.autocast) -> list[str]:
    """Run one batch through the model.

    Returns:
        The names of its rules, where none of them sends an error to anything: the model then learns as by backpropagation.

    Raises:
        UnfitModel: the model does not run on these images, or does not give logits [N, classes].
        InputError: a rule has something against it.
    """
    shape = "x".join(map(str, batch.images.shape[1:]))
    modes = [(module, module.training) for module in model.modules()]
    try:
        # With gradients: some rules look at the model's output only then.
        with as_found(model), autocast, targets(model, batch.labels), senders(model) as sending:
            logits = model.eval()(batch.images)
    except InputError:
        raise
    except Exception as error:  # a model is code of others: it may raise anything
        raise UnfitModel(f"model {name!r} does not run on images of shape {shape} (CxHxW): {one_line(error)}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    images = len(batch.labels)
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(given, tuple) or len(given) != 2 or given[0] != images or given[1] < classes:
        raise UnfitModel(
            f"model {name!r} must give logits of shape {(images, classes)} for {images} images of shape {shape} (CxHxW), "
            f"and gave {given}"
        )
    return [] if sending else list(feedback_rules(model))


def try_smallest_pass(model: nn.Module, recipe: Recipe, train: Stream, autocast: torch.autocast) -> None:
    """Train on one image where a pass has no more, which batch norm can not do.

    Raises:
        InputError: it can not be done.
    """
    size, world = recipe.data.batch_size, train.view.world
    batches = {min(size, train.images), train.images % size or size}
    shares = {count // world // max(1, min(recipe.train.accumulate, count // world)) for count in batches}
    if min(shares) > 1:
        return
    batch = next(iter(train))
    try:
        with as_found(model), autocast, targets(model, batch.labels[:1]):
            model.train()(batch.images[:1])
    except ValueError as error:
        what = (
            f"{train.images:,} images in batches of {size} leave a pass with a single one, on which the model can not be trained"
        )
        raise InputError(
            f"{what} ({' '.join(str(error).split())}): choose another data.batch_size, data.limit or data.validation"
        ) from error
