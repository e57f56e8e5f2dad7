"""Finding where a number that is infinite, or not a number, came from: the step, the layer, and the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fahooks.data import Batch
from fahooks.observation import as_found, tensors
from fahooks.surgery import feedback_rules
from fahooks.training.checkpoint import Checkpoints, restore
from fahooks.training.setup import Setup
from fahooks.training.step import counted, known, loss_of, take_step
from fahooks.training.stopping import Stop, Stopped


def origin(setup: Setup, checkpoints: Checkpoints, best: Path, steps: range, stop: Stop) -> tuple[int, str] | None:
    """Take the steps since the newest checkpoint again, and look closely at those among them where numbers stopped being finite.

    Arguments:
        setup: what `prepare` made; it ends somewhere in between.
        checkpoints: of the run.
        best: the file of the best weights.
        steps: those to look at, which lie in one epoch with the checkpoint; 1 is the first step of the run.
        stop: whether the run is asked to stop.

    Returns:
        The step, and what `first_not_finite` says of it, or which parameter it left infinite or not a number; None where all
        numbers are finite this time.

    Raises:
        Stopped: the run was asked to stop.
    """
    _, state = checkpoints.newest()
    progress = restore(state, setup.parts, best)
    setup.model.train()
    setup.train.set_epoch(progress.epoch + 1, start=progress.batch)
    for step, batch in enumerate(setup.train, start=progress.step + 1):
        if stop.requested:
            raise Stopped
        if step in steps:
            found = first_not_finite(setup.model, partial(_loss, setup, batch), backward=not setup.scaler.is_enabled())
            if found is not None:
                return step, found
        if step >= steps.stop:
            break
        take_step(setup, batch)
        if step in steps:
            bad = next(((name, p) for name, p in setup.model.named_parameters() if not _finite(p)), None)
            if bad is not None:
                return step, f"{bad[0]!r} was {_kind(bad[1])} after the optimizer's step"
    return None


def _loss(setup: Setup, batch: Batch) -> Tensor:
    """The loss of a batch, as a step takes it in one pass, but without the factor of a GradScaler."""
    loss, summed, _ = loss_of(setup, setup.model, batch.images, known(batch), count=counted(setup, batch))
    return summed if setup.scaler.is_enabled() else loss


def first_not_finite(model: nn.Module, loss: Callable[[], Tensor], *, backward: bool = True) -> str | None:
    """Which layer of `model` first made a number that is not finite, and in which pass; None where all are finite.

    The layers are the modules that hold no others, or parameters of their own. Parameters' `.grad`, buffers and random number
    generators are left as they were.

    Arguments:
        model: the model.
        loss: runs it on one batch and returns the scalar loss.
        backward: look at the backward pass too; a GradScaler provides for gradients that are not finite.

    Returns:
        Words such as "layer 'conv1' gave inf in the forward pass, from finite inputs and weights".
    """
    found: list[str] = []
    with as_found(model), _watched(model, found), torch.enable_grad():
        value = loss()
        if not found and not _finite(value):
            found.append(f"the loss was {_kind(value)}, of outputs that are finite")
        if not found and backward:
            torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return found[0] if found else None


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note in `found`, in order, what the layers of `model` make that is not finite of what is.

    Autograd calls the hook of a parameter when its gradient is there: in the order of the backward pass, not that of parameters.
    """
    handles: list[Any] = []

    def gradient_of(name: str, gradient: Tensor) -> None:
        if not _finite(gradient):
            found.append(f"{name!r} got a gradient of {_kind(gradient)} in the backward pass")

    def watch(name: str, module: nn.Module) -> None:
        said = f"layer {name!r}" if name else "the model"
        errors_above: list[bool] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # A view of its own for each reader of a tensor: the gradient at it is then this layer's alone.
            own = tuple(a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in args)
            for tensor in tensors(own):
                if tensor.requires_grad:
                    tensor.register_hook(below)
            return own

        def after(module: nn.Module, args: Any, output: Any) -> None:
            weights = [n for n, p in module.named_parameters(recurse=False) if not _finite(p)]
            bad = next((t for t in tensors(output) if not _finite(t)), None)
            if bad is not None:
                if weights:
                    why = f"from its {' and '.join(weights)}, which was not finite"
                elif all(_finite(t) for t in tensors(args)):
                    why = "from finite inputs and weights"
                else:
                    why = "from an input that was not finite"
                found.append(f"{said} gave {_kind(bad)} in the forward pass, {why}")
            for tensor in tensors(output):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(above)

        def above(error: Tensor) -> None:
            errors_above.append(_finite(error))
            if not _finite(error):
                found.append(f"{said} got an error of {_kind(error)} from above, in the backward pass")

        def below(error: Tensor) -> None:
            if not _finite(error) and all(errors_above):
                found.append(f"{said} sent an error of {_kind(error)} below in the backward pass, of a finite one")

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    rules = {id(part) for rule in feedback_rules(model).values() for part in rule.modules()}
    for name, module in model.named_modules():
        holds_none = all(id(child) in rules for child in module.children())
        if id(module) not in rules and (holds_none or module._parameters):
            watch(name, module)
    handles += [p.register_hook(partial(gradient_of, name)) for name, p in model.named_parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def _kind(tensor: Tensor) -> str:
    """What a tensor has that is not finite: "nan" or "inf"."""
    return "nan" if bool(tensor.isnan().any()) else "inf"
