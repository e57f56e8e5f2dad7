"""Training: from what `prepare` made to a test error, with everything about it in the run directory."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fahooks.data import Stream
from fahooks.plugins import InputError
from fahooks.probes import Probe
from fahooks.rules import targets
from fahooks.training import checkpoint
from fahooks.training.checkpoint import Progress
from fahooks.training.progress import Display
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import Setup

# How many steps apart the loss is looked at: each look makes the host wait for the device.
LOOK_EVERY = 20


class Diverged(InputError):
    """The loss became infinite or not a number."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        test_error: of the weights with the lowest validation error, in percent.
        best_epoch: the epoch that they come from.
        validation_error: the error that chose it, in percent.
        final_test_error: of the weights after the last epoch, in percent.
        seconds: time spent training, over all sittings.
    """

    test_error: float
    best_epoch: int
    validation_error: float
    final_test_error: float
    seconds: float


def train(setup: Setup, run: RunDirectory, *, resume: bool = False, console: Console | None = None) -> Result:
    """Train and leave everything about it in `run`.

    The best epoch is the one with the lowest error on the validation split. The test set is looked at only afterwards: once with
    the last weights, once with the best ones.

    Arguments:
        setup: what `prepare` made; its model is trained in place and ends with the best weights.
        run: where files go.
        resume: go on after the last finished epoch of `run`; on a CPU the end is bit for bit that of an uninterrupted run.
        console: where to show progress; by default standard output.

    Raises:
        Diverged: the loss became infinite or not a number.
        InputError: the checkpoint to resume from can not be read.
    """
    run.status("running")
    try:
        result = _train(setup, run, resume, console or Console())
    except KeyboardInterrupt:
        run.status("interrupted", resume=f"fahooks train --resume {run.path}")
        raise
    except BaseException as error:
        run.status("failed", reason=f"{type(error).__name__}: {error}")
        raise
    run.status("finished", result=asdict(result))
    return result


def _train(setup: Setup, run: RunDirectory, resume: bool, console: Console) -> Result:
    p = Probe(setup.model)  # before the checkpoint: sign flips count from the first weights, also in a resumed run
    progress = Progress()
    if resume and run.checkpoint.is_file():
        progress = checkpoint.restore(run.checkpoint, setup.model, setup.optimizer, setup.schedule, setup.hooks, best=run.best)
    run.trim(progress.epoch)
    run.layers(setup.report.as_dict())
    epochs = setup.recipe.train.epochs
    started = time.perf_counter() - progress.seconds
    with (
        Display(setup.recipe.name, console, steps=epochs * len(setup.train), done=progress.step) as display,
        SummaryWriter(str(run.tensorboard), purge_step=progress.step if resume else None) as board,
    ):
        for epoch in range(progress.epoch + 1, epochs + 1):
            row = {"epoch": epoch, **train_epoch(setup, epoch, progress, p, run, board, display)}
            row |= evaluate(setup, setup.validation, "validation")
            progress.epoch = epoch
            progress.seconds = time.perf_counter() - started
            if row["validation_error"] < progress.best_error:
                progress.best_error, progress.best_epoch = row["validation_error"], epoch
                checkpoint.save_weights(run.best, setup.model)
            row["seconds"] = progress.seconds
            run.log("epoch", **row)
            run.summarise()
            _to_board(board, {name: value for name, value in row.items() if name != "epoch"}, epoch)
            checkpoint.save(run.checkpoint, setup.model, setup.optimizer, setup.schedule, setup.hooks, progress, best=run.best)
            display.line(
                f"epoch {epoch}/{epochs}  loss {row['train_loss']:.4f}  error {row['train_error']:.2f} %  "
                f"validation error {row['validation_error']:.2f} %  {row['images_per_second']:,.0f} images/s"
            )
        final = evaluate(setup, setup.test, "test")
        run.log("test", weights="final", epoch=progress.epoch, **final)
        checkpoint.load_weights(run.best, setup.model)
        best = final if progress.best_epoch == progress.epoch else evaluate(setup, setup.test, "test")
        run.log("test", weights="best", epoch=progress.best_epoch, **best)
        run.summarise()
        _to_board(board, best, progress.best_epoch)
    return Result(best["test_error"], progress.best_epoch, progress.best_error, final["test_error"], progress.seconds)


def train_epoch(
    setup: Setup, epoch: int, progress: Progress, p: Probe, run: RunDirectory, board: SummaryWriter, display: Display
) -> dict[str, Any]:
    """One pass over the training images.

    Returns:
        step, lr, train_loss, train_error (percent, of the weights as they were at each step, with dropout), images_per_second.

    Raises:
        Diverged: the loss became infinite or not a number.
    """
    setup.model.train()
    every = setup.recipe.probes.every
    lr = setup.optimizer.param_groups[0]["lr"]
    loss_sum = torch.zeros((), device=setup.device)
    wrong = torch.zeros((), dtype=torch.int64, device=setup.device)
    seen = 0
    started = time.perf_counter()
    shown: dict[str, Any] = {}
    setup.train.set_epoch(epoch)
    for batch in setup.train:
        if every and progress.step % every == 0:
            _measure(setup, p, batch.images, batch.labels)
            _log_probe(run, board, p, epoch, progress.step)

        with setup.autocast, targets(setup.model, batch.labels):
            logits = setup.forward(batch.images)
            loss = F.cross_entropy(logits, batch.labels)
        setup.optimizer.zero_grad()
        loss.backward()
        setup.optimizer.step()

        progress.step += 1
        seen += len(batch.labels)
        loss_sum += loss.detach() * len(batch.labels)
        wrong += (logits.detach().argmax(1) != batch.labels).sum()
        if progress.step % LOOK_EVERY == 0 or seen == setup.train.images:
            speed = seen / (time.perf_counter() - started)
            shown = {"loss": loss_sum.item() / seen, "error": 100 * wrong.item() / seen, "speed": speed}
            if not math.isfinite(shown["loss"]):
                where = f"by step {progress.step}, in epoch {epoch}"
                raise Diverged(f"the loss was {shown['loss']} {where}: lower optim.lr (it was {lr:g})")
            display.step(progress.step, epoch=f"{epoch}/{setup.recipe.train.epochs}", **shown)
    setup.schedule.step()
    return {
        "step": progress.step,
        "lr": lr,
        "train_loss": shown["loss"],
        "train_error": shown["error"],
        "images_per_second": shown["speed"],
    }


@torch.no_grad()
def evaluate(setup: Setup, stream: Stream, name: str) -> dict[str, Any]:
    """Mean cross-entropy and error (percent) over all images of `stream`, in evaluation mode, as NAME_loss and NAME_error."""
    setup.model.eval()
    loss = 0.0
    wrong = 0
    for batch in stream:
        with setup.autocast:
            logits = setup.model(batch.images)
        loss += F.cross_entropy(logits.float(), batch.labels, reduction="sum").item()
        wrong += int((logits.argmax(1) != batch.labels).sum())
    return {f"{name}_loss": loss / stream.images, f"{name}_error": 100 * wrong / stream.images}


def _measure(setup: Setup, p: Probe, images: Tensor, labels: Tensor) -> None:
    def loss() -> Tensor:
        with setup.autocast, targets(setup.model, labels):
            return F.cross_entropy(setup.model(images), labels)

    p.measure(loss)


def _log_probe(run: RunDirectory, board: SummaryWriter, p: Probe, epoch: int, step: int) -> None:
    found = {"angle": p.angle, "norm_ratio": p.norm_ratio, "weight_angle": p.weight_angle, "sign_flips": p.sign_flips}
    run.log("probe", epoch=epoch, step=step, **found)
    for quantity, by_layer in found.items():
        _to_board(board, {f"{quantity}/{layer}": value for layer, value in by_layer.items()}, step)


def _to_board(board: SummaryWriter, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        board.add_scalar(name, value, step)
