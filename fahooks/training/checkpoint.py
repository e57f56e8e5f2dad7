"""Checkpoints: everything that a run needs to go on, and the best weights alone."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fahooks.plugins import InputError
from fahooks.surgery import feedback_layers
from fahooks.training.distributed import of_every_rank, rank, sharded, whole
from fahooks.training.failures import is_out_of_memory
from fahooks.training.run_directory import to_disk, write
from fahooks.training.sameness import check_same

VERSION = 4


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: finished epochs, validation included.
        batch: batches of the epoch after them that were trained on.
        lr: learning rate at the beginning of that epoch.
        step: optimizer steps taken.
        best_epoch: the epoch with the lowest validation error, the first one where several tie; 0 before any.
        best_error: that error, in percent.
        seconds: time spent so far, over all sittings.
        loss_sum: of the images of the present epoch so far.
        wrong: how many of them were taken for another class.
        seen: how many they are.
        epoch_seconds: time spent on them.
    """

    epoch: int = 0
    batch: int = 0
    lr: float = 0.0
    step: int = 0
    best_epoch: int = 0
    best_error: float = float("inf")
    seconds: float = 0.0
    loss_sum: float = 0.0
    wrong: int = 0
    seen: int = 0
    epoch_seconds: float = 0.0

    def finish_epoch(self) -> None:
        """Count the present epoch as finished, and begin the next one."""
        self.epoch += 1
        self.batch = self.wrong = self.seen = 0
        self.loss_sum = self.epoch_seconds = 0.0


class Stateful(Protocol):
    """What keeps something that a run needs to go on: a model, an optimizer, a schedule, hooks, a scaler, averaged weights."""

    def state_dict(self) -> Any:
        """What it keeps."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go on from what `state_dict` returned."""
        ...


class Unusable(InputError):
    """A checkpoint is truncated, damaged, of another version, or none of this run."""


class PassedOver(UserWarning):
    """A checkpoint is unusable, and the one before is taken."""


class Checkpoints:
    """The checkpoints of one run, a file each, named by the optimizer steps that were taken.

    Arguments:
        folder: where they lie.
        recipe: of the run, as plain data; a checkpoint of another recipe is refused.
        keep: how many are kept, the newest ones.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], keep: int = 1) -> None:
        self.folder = folder
        self.recipe = recipe
        self.keep = keep

    def paths(self) -> list[Path]:
        """The files, the newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def save(self, parts: Mapping[str, Stateful], progress: Progress, best: Path) -> Path:
        """Write a checkpoint atomically, then delete those that are too old. If that fails, the others are as before.

        Arguments:
            parts: what keeps the state of the run, by name.
            progress: how far it is.
            best: the file of the best weights, which become part of the checkpoint if they are there.
        """
        path = self.folder / f"step-{progress.step:09d}.pt"
        state = {
            "version": VERSION,
            "recipe": dict(self.recipe),
            "progress": dict(vars(progress)),
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "best": load_file(best) if progress.best_epoch and rank() == 0 else {},
            "generators": _generators(),
        }
        if rank() == 0:
            if not self.folder.is_dir():
                self.folder.mkdir()
                to_disk(self.folder.parent)
            write(path, partial(_dump, state))
        self.prune(path)
        return path

    def prune(self, newest: Path) -> None:
        """Delete those that are too old, counted from `newest` on: what a run left that was killed before it did so, as well."""
        if rank() == 0:
            paths = self.paths()
            for old in paths[paths.index(newest) :][self.keep :]:
                old.unlink()

    def newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint that is whole, and its state; None where nothing was saved yet.

        An older one than the newest is taken, with a warning, since it is provably of the same run: it has the recipe in it, and
        a recipe and its seed determine every step. So a run that goes on from there takes steps again, the same ones.

        Raises:
            Unusable: none is whole.
            InputError: the newest whole one is of another recipe; the message has the differences.
        """
        refused: list[str] = []
        for path in self.paths():
            try:
                state = read(path)
            except Unusable as error:
                refused.append(str(error))
            else:
                check_same(state["recipe"], self.recipe, f"checkpoint {str(path)!r} was written")
                for line in refused if rank() == 0 else ():
                    warnings.warn(f"{line}; {path.name} is taken in its place", PassedOver, stacklevel=2)
                return path, state
        if refused:
            left = f"no checkpoint in {str(self.folder)!r} is left to go on from: start the run anew"
            raise Unusable("\n".join([*refused, left]))
        return None, {}


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint; nothing in it is executed.

    Raises:
        Unusable: it is truncated or damaged, no checkpoint of a run, or of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise Unusable(f"checkpoint {str(path)!r} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise Unusable(f"checkpoint {str(path)!r} is truncated or no checkpoint ({error})") from error
    except Unusable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise Unusable(f"checkpoint {str(path)!r} can not be read ({type(error).__name__})") from error
    if not isinstance(state, dict) or "version" not in state:
        raise Unusable(f"{str(path)!r} is no checkpoint of a run")
    if state["version"] != VERSION:
        raise Unusable(f"checkpoint {str(path)!r} has version {state['version']}, this is for version {VERSION}")
    return state


def restore(state: Mapping[str, Any], parts: Mapping[str, Stateful], best: Path) -> Progress:
    """Put what `read` returned back into the objects of a run, the random number generators and the file `best`.

    Raises:
        Unusable: the state is that of other objects.
    """
    saved = state["parts"]
    if saved.keys() != parts.keys():
        raise Unusable(f"the checkpoint has the state of {', '.join(saved)}, and the run needs that of {', '.join(parts)}")
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise Unusable(f"the checkpoint does not fit this run: {name}: {reason}") from error
    if rank() < len(state["generators"]):
        own = state["generators"][rank()]
        torch.set_rng_state(own["cpu"])
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
    # A run that was killed between the two files left the best weights of an epoch that the checkpoint does not know.
    if rank() == 0 and state["best"]:
        _write_weights(best, state["best"])
    elif rank() == 0:
        best.unlink(missing_ok=True)
    return Progress(**state["progress"])


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the model's own weights, without rules' state, as safetensors, atomically: a plain model loads them."""
    converted = set(feedback_layers(model).values())
    # A layer that several modules share has a key by each of its names.
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in converted]
    rules = tuple(f"{name}.feedback." if name else "feedback." for name in names)
    state = whole({key: value for key, value in model.state_dict().items() if not key.startswith(rules)})
    if rank() == 0:
        _write_weights(path, state)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what `save_weights` wrote into a model, converted or plain."""
    model.load_state_dict(sharded(load_file(path), model.state_dict()))


def _dump(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # On a full disk torch's writer ends with words about positions, in place of the error that it met.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _generators() -> list[dict[str, Tensor | None]]:
    """The states of the random number generators, of every rank."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return of_every_rank({"cpu": torch.get_rng_state(), "cuda": cuda})


def _write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    data = to_safetensors({key: value.detach().cpu().contiguous().clone() for key, value in state.items()})
    write(path, lambda file: file.write(data))
