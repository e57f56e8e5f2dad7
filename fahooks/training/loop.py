"""Training: from what `prepare` made to a test error, with everything about it in the run directory."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.tensorboard import SummaryWriter

from fahooks.data import Batch
from fahooks.plugins import InputError
from fahooks.probes import Probe
from fahooks.rules import IGNORED
from fahooks.training import checkpoint
from fahooks.training.checkpoint import Checkpoints, Progress
from fahooks.training.distributed import any_rank, of_every_rank, rank, share_buffers, total, world
from fahooks.training.divergence import origin
from fahooks.training.failures import recorded
from fahooks.training.progress import Display
from fahooks.training.run_directory import RunDirectory, to_disk
from fahooks.training.setup import Setup
from fahooks.training.step import Outcome, counted, known, loss_of, take_step
from fahooks.training.stopping import Stop, Stopped

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


@dataclass
class Sitting:
    """What is there while a run is trained, in one go or in several.

    Attributes:
        setup: what `prepare` made.
        run: where files go.
        progress: how far the run is.
        checkpoints: of the run.
        probe: measures its learning signals.
        board: TensorBoard's; None on other ranks than 0.
        display: what a person sees.
        stop: whether it was asked to stop.
        begun: when it would have begun, had it been trained in one go.
        saved: when it was last saved.
    """

    setup: Setup
    run: RunDirectory
    progress: Progress
    checkpoints: Checkpoints
    probe: Probe
    board: SummaryWriter | None
    display: Display
    stop: Stop
    begun: float
    saved: float

    @property
    def due_by_steps(self) -> bool:
        """Whether the recipe wants a checkpoint after this step."""
        every = self.setup.recipe.checkpoint.every
        return every is not None and self.progress.step % every == 0

    def asked(self, look: bool) -> tuple[bool, bool]:
        """Whether the run was asked to stop, and whether it is time to save. Several ranks agree on it where they `look`."""
        if world() > 1 and not look:
            return False, False
        minutes = self.setup.recipe.checkpoint.minutes
        by_minutes = minutes is not None and time.perf_counter() - self.saved > 60 * minutes
        return any_rank(self.stop.requested), any_rank(by_minutes) or self.due_by_steps

    @property
    def ended(self) -> bool:
        """Whether the run has taken as many steps as it may."""
        most = self.setup.recipe.train.max_steps
        return most is not None and self.progress.step >= most

    def save(self) -> None:
        """Write a checkpoint of this moment.

        Raises:
            Diverged: a weight or a running statistic is not finite; the checkpoints are as before.
        """
        if any_rank(not _finite(self.setup.model)):
            raise Diverged(f"a weight, or a running statistic, was infinite or not a number after step {self.progress.step}")
        self.record_skipped()
        if self.board is not None:
            self.board.flush()  # or a kill would take events of steps that are not taken again
            self.run.sync()
        self.progress.seconds = time.perf_counter() - self.begun
        self.checkpoints.save(self.setup.parts, self.progress, self.run.best)
        self.saved = time.perf_counter()

    def record_skipped(self) -> None:
        """Leave in skipped.txt which images were skipped that can not be decoded, by whichever process."""
        if self.setup.recipe.data.corrupt == "refuse":
            return
        streams = {"train": self.setup.train, "validation": self.setup.validation, "test": self.setup.test}
        met = of_every_rank([f"{split}: {what}" for split, stream in streams.items() for what in stream.skipped])
        self.run.skip({image for images in met for image in images})


def train(
    setup: Setup, run: RunDirectory, *, resume: bool = False, console: Console | None = None, stop: Stop | None = None
) -> Result:
    """Train and leave everything about it in `run`.

    The best epoch is the one with the lowest error on the validation split. The test set is looked at only afterwards: once with
    the last weights, once with the best ones.

    Arguments:
        setup: what `prepare` made; the model that it evaluates ends with the best weights.
        run: where files go.
        resume: go on after the last step that `run` has a checkpoint of; on a CPU the end is bit for bit that of an uninterrupted
            run.
        console: where to show progress; by default standard output.
        stop: notes being asked to stop; by default one of its own, and a run that is asked when it is over just ends.

    Raises:
        Diverged: the loss became infinite or not a number.
        InputError: there is no checkpoint that the run can go on from.
        Failed: something else went wrong; the message says what.
        KeyboardInterrupt: it was asked to stop, by Ctrl-C, SIGTERM or SIGHUP; the message says how to go on.
    """
    with recorded(run), Stop() if stop is None else nullcontext(stop) as stop:
        run.status("running")
        try:
            result = _train(setup, run, resume, console or Console(quiet=rank() != 0), stop)
        except KeyboardInterrupt as error:
            what = str(error) or "stopped"
            raise KeyboardInterrupt(f"{what}; go on with `fahooks train --resume {run.path}`") from error
        except Exception as error:
            if stop.requested and _of_compiler(error):  # whose processes Ctrl-C ends too
                raise KeyboardInterrupt(f"stopped in a step; go on with `fahooks train --resume {run.path}`") from error
            raise
        if rank() == 0:
            _plot(run)
        run.status("finished", result=asdict(result))
    return result


def _train(setup: Setup, run: RunDirectory, resume: bool, console: Console, stop: Stop) -> Result:
    # Before the checkpoint: sign flips count from the first weights, also in a resumed run.
    probe = Probe(setup.model, total=total)
    recipe = setup.recipe
    checkpoints = Checkpoints(run.checkpoints, recipe.model_dump(mode="json"), keep=recipe.checkpoint.keep)
    path, state = checkpoints.newest() if resume else (None, {})
    progress = Progress() if path is None else checkpoint.restore(state, setup.parts, run.best)
    if path is not None:
        checkpoints.prune(path)
    run.trim(progress.epoch, progress.step)
    run.layers(setup.report.as_dict())
    epochs = recipe.train.epochs
    with (
        Display(recipe.name, console, steps=setup.steps, done=progress.step) as display,
        _board(run, progress.step if resume else None) if rank() == 0 else nullcontext() as board,
    ):
        now = time.perf_counter()
        sitting = Sitting(setup, run, progress, checkpoints, probe, board, display, stop, now - progress.seconds, now)
        if path is None:
            sitting.save()  # so that a disk without room is found out now
        if path is not None:
            display.line(f"goes on after step {progress.step}, in epoch {min(progress.epoch + 1, epochs)}/{epochs}, from {path}")
            if lost := run.lost(progress.epoch, progress.step, recipe.probes.every):
                display.line(f"{run.metrics} has lost rows ({lost}), as to a power cut: curves have a gap there")
        try:
            for epoch in range(progress.epoch + 1, epochs + 1):
                if sitting.ended and not progress.batch:
                    break
                _epoch(sitting, epoch)
        except Stopped as stopped:
            sitting.save()
            raise Stopped(f"stopped after step {progress.step}, which is saved") from stopped
        except Diverged as error:
            raise _explained(sitting, error) from error
        final = evaluate(setup, setup.test, "test", stop)
        run.log("test", weights="final", epoch=progress.epoch, **final)
        checkpoint.load_weights(run.best, setup.evaluated)
        best = final if progress.best_epoch == progress.epoch else evaluate(setup, setup.test, "test", stop)
        run.log("test", weights="best", epoch=progress.best_epoch, **best)
        sitting.record_skipped()
        run.summarise()
        _to_board(board, best, progress.step)
    return Result(best["test_error"], progress.best_epoch, progress.best_error, final["test_error"], progress.seconds)


def _explained(sitting: Sitting, error: Diverged) -> Diverged:
    """The error, with the step, the layer and the pass that it came from, which one process alone can find."""
    last, newest = sitting.progress.step, f"{sitting.checkpoints.paths()[0]}, the last checkpoint"
    recipe = shlex.quote(str(sitting.run.path / "resolved.yaml"))
    lower = f"fahooks train {recipe} --set optim.lr={sitting.setup.recipe.optim.lr / 10:g}"
    anew = f"start anew with a lower optim.lr, as by `{lower}`, or with train.clip_norm"
    if world() > 1:
        return Diverged(f"{error}: resumed in one process, from {newest}, the run says which layer it came from; {anew}")
    sitting.display.line(f"{error}: the steps since the last checkpoint are taken again, to find where that came from")
    steps = range(last - LOOK_EVERY, last + 1)
    found = origin(sitting.setup, sitting.checkpoints, sitting.run.best, steps, sitting.stop)
    if found is None:
        return Diverged(f"{error}: taken again, the same steps stay finite; --resume goes on from {newest}; or {anew}")
    return Diverged(f"{error}: first at step {found[0]}, {found[1]}; --resume would come to the same from {newest}; {anew}")


def _epoch(sitting: Sitting, epoch: int) -> None:
    """Train for an epoch, or what is left of it, validate, log, and save."""
    setup, run, progress = sitting.setup, sitting.run, sitting.progress
    row = {"epoch": epoch, **train_epoch(sitting, epoch)}
    row |= evaluate(setup, setup.validation, "validation", sitting.stop)
    progress.finish_epoch()
    if row["validation_error"] < progress.best_error:
        progress.best_error, progress.best_epoch = row["validation_error"], epoch
        checkpoint.save_weights(run.best, setup.evaluated)
    row["seconds"] = time.perf_counter() - sitting.begun
    run.log("epoch", **row)
    run.summarise()
    _to_board(sitting.board, _curves(row), progress.step)
    sitting.save()
    sitting.display.line(
        f"epoch {epoch}/{setup.recipe.train.epochs}  loss {row['train_loss']:.4f}  error {row['train_error']:.2f} %  "
        f"validation error {row['validation_error']:.2f} %  {row['images_per_second']:,.0f} images/s"
    )


def train_epoch(sitting: Sitting, epoch: int) -> dict[str, Any]:
    """One pass over the training images, or the rest of it in a run that goes on.

    Returns:
        step, lr, train_loss, train_error (percent, of the weights as they were at each step, with dropout), images_per_second.

    Raises:
        Diverged: the loss became infinite or not a number.
        Stopped: the run was asked to stop, and finished a step first.
    """
    setup, progress = sitting.setup, sitting.progress
    setup.model.train()
    every = setup.recipe.probes.every
    if progress.batch == 0:
        progress.lr = setup.optimizer.param_groups[0]["lr"]
    outcomes: list[Outcome] = []  # since the last look
    begun = time.perf_counter() - progress.epoch_seconds
    setup.train.set_epoch(epoch, start=progress.batch)
    for batch in () if sitting.ended else setup.train:
        if every and progress.step % every == 0:
            _probe(setup, sitting.probe, batch)
            _log_probe(sitting, epoch)
        outcomes += take_step(setup, batch)
        progress.step += 1
        progress.batch += 1
        last = progress.batch == len(setup.train) or sitting.ended
        look = progress.step % LOOK_EVERY == 0 or last or sitting.due_by_steps
        stopping, due = sitting.asked(look)
        if look or stopping or due:
            _add(progress, outcomes)
            outcomes.clear()
            progress.epoch_seconds = time.perf_counter() - begun
            if not math.isfinite(progress.loss_sum):
                raise Diverged(f"the loss was {progress.loss_sum} by step {progress.step}, in epoch {epoch}")
            sitting.display.step(progress.step, epoch=f"{epoch}/{setup.recipe.train.epochs}", **_shown(progress))
        if stopping:
            raise Stopped
        if last:
            break
        if due:
            sitting.save()
    shown = _shown(progress)
    return {
        "step": progress.step,
        "lr": progress.lr,
        "train_loss": shown["loss"],
        "train_error": shown["error"],
        "images_per_second": shown["speed"],
    }


def _add(progress: Progress, outcomes: list[Outcome]) -> None:
    """Count what passes found, on all ranks; losses one after the other, so that sums have the same bits wherever looks were."""
    losses, answers, labels = zip(*outcomes, strict=True)
    for loss in total(torch.stack(losses).double()).tolist():
        progress.loss_sum += loss
    given, wanted = torch.cat(answers), torch.cat(labels)
    right, seen = total(torch.stack([(given == wanted).sum(), (wanted != IGNORED).sum()])).tolist()
    progress.wrong += seen - right
    progress.seen += seen


def _shown(progress: Progress) -> dict[str, float]:
    """Mean loss, error (percent) and speed (images a second) of the present epoch so far."""
    seen = max(1, progress.seen)  # files that can not be decoded may be all that was met so far
    return {"loss": progress.loss_sum / seen, "error": 100 * progress.wrong / seen, "speed": seen / progress.epoch_seconds}


def evaluate(setup: Setup, stream: Iterable[Batch], name: str, stop: Stop | None = None) -> dict[str, Any]:
    """Loss and error as `measure` finds them, under NAME_loss and NAME_error.

    Raises:
        Diverged: the loss is infinite or not a number, and so the error worth nothing.
        Stopped: `stop` was asked for.
        InputError: no image is valid.
    """
    found = measure(setup, stream, name, stop)
    if not math.isfinite(found["loss"]):
        raise Diverged(f"the {name} loss was {found['loss']}, in evaluation mode")
    return {f"{name}_loss": found["loss"], f"{name}_error": found["error"]}


@torch.no_grad()
def measure(setup: Setup, stream: Iterable[Batch], name: str, stop: Stop | None = None) -> dict[str, float]:
    """Mean cross-entropy and error (percent) over all valid images of a split, in evaluation mode.

    Arguments:
        setup: what `prepare` made.
        stream: the split.
        name: what messages call it.
        stop: whether the run is asked to stop.

    Returns:
        loss, error and images, how many of them are valid, over all ranks.

    Raises:
        Stopped: `stop` was asked for.
        InputError: no image is valid.
    """
    model = setup.evaluated.eval()
    share_buffers(model)
    sums = torch.zeros(3, dtype=torch.float64, device=setup.device)  # of losses, of right answers, and of images
    for batch in stream:
        if stop is not None and any_rank(stop.requested):
            raise Stopped
        labels = known(batch)
        with setup.autocast:
            logits = model(batch.images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        sums += torch.stack([loss.double(), right.double(), batch.valid.sum().double()])
    loss, right, seen = total(sums).tolist()
    if not seen:
        raise InputError(f"no image of the {name} split can be decoded, so there is nothing to measure an error on")
    return {"loss": loss / seen, "error": 100 * (seen - right) / seen, "images": int(seen)}


def _probe(setup: Setup, p: Probe, batch: Batch) -> None:
    count = counted(setup, batch)
    part = batch.split(setup.recipe.train.accumulate, setup.train.view.world)[0]  # more may find no room
    p.measure(lambda: loss_of(setup, setup.model, part.images, known(part), count=count)[0])


def _log_probe(sitting: Sitting, epoch: int) -> None:
    p, step = sitting.probe, sitting.progress.step
    found = {"angle": p.angle, "norm_ratio": p.norm_ratio, "weight_angle": p.weight_angle, "sign_flips": p.sign_flips}
    sitting.run.log("probe", epoch=epoch, step=step, **found)
    for quantity, by_layer in found.items():
        _to_board(sitting.board, {f"{quantity}/{layer}": value for layer, value in by_layer.items()}, step)


def _board(run: RunDirectory, resumed_at: int | None) -> SummaryWriter:
    """TensorBoard's writer; in a run that goes on it takes back what was written from step `resumed_at` on."""
    # TensorBoard reads files in the order of their names, in which only the second in which they were begun is sure to grow.
    while any(run.tensorboard.glob(f"*.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.02)
    board = SummaryWriter(str(run.tensorboard), purge_step=resumed_at)
    for folder in (run.tensorboard, run.path):
        to_disk(folder)
    for row in run.rows("epoch")[-1:]:
        if resumed_at is not None and row["step"] == resumed_at:  # the epoch that the checkpoint ends is not trained again
            _to_board(board, _curves(row), resumed_at)
    return board


def _curves(row: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard draws of the row of an epoch; null, which stood for infinite or not a number, can not be drawn."""
    return {name: value for name, value in row.items() if name not in ("kind", "epoch", "step") and value is not None}


def _to_board(board: SummaryWriter | None, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        if board is not None:
            board.add_scalar(name, value, step)


def _plot(run: RunDirectory) -> None:
    from fahooks.report import figures  # matplotlib is slow to import
    from fahooks.report.runs import read_run

    figures.comparison([read_run(run.path)], run.plots)


def _of_compiler(error: Exception) -> bool:
    """Whether torch.compile raised it, whose module takes long to import."""
    return any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__)


def _finite(model: nn.Module) -> bool:
    """Whether all parameters and running statistics are; a mask may well hold infinities."""
    statistics = (
        buffer for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers(recurse=False)
    )
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (*model.parameters(), *statistics)]
    return bool(torch.stack([tensor.isfinite().all() for tensor in own]).all())
