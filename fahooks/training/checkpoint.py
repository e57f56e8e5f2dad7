"""Checkpoints: everything that a run needs to go on, and the best weights alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fahooks.hooks import Attachment
from fahooks.plugins import InputError
from fahooks.surgery import feedback_layers

VERSION = 3


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: finished epochs.
        step: optimizer steps taken.
        best_epoch: the epoch with the lowest validation error, the first one where several tie; 0 before any.
        best_error: that error, in percent.
        seconds: time spent so far, over all sittings.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_error: float = float("inf")
    seconds: float = 0.0


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    hooks: Attachment | None,
    progress: Progress,
    *,
    best: Path,
) -> None:
    """Write a checkpoint atomically, random number generators and the weights in the file `best` included."""
    state = {
        "version": VERSION,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "hooks": hooks.state_dict() if hooks else None,
        "progress": vars(progress),
        "best": load_file(best),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, hooks: Attachment | None, *, best: Path
) -> Progress:
    """Read a checkpoint back into the objects of a run, random number generators included, and the file `best`.

    Raises:
        InputError: the file is damaged or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"checkpoint {str(path)!r} can not be read ({type(error).__name__}): start the run anew") from error
    if state.get("version") != VERSION:
        raise InputError(f"checkpoint {str(path)!r} has version {state.get('version')}, this is for version {VERSION}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if hooks is not None:
        hooks.load_state_dict(state["hooks"] or {"steps": 0, "hooks": []})
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"] and len(state["rng_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    # A run that was killed between the two files left the best weights of an epoch that the checkpoint does not know.
    _write_weights(best, state["best"])
    return Progress(**state["progress"])


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the model's own weights, without rules' state, as safetensors, atomically: a plain model loads them."""
    converted = set(feedback_layers(model).values())
    # A layer that several modules share has a key by each of its names.
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in converted]
    rules = tuple(f"{name}.feedback." if name else "feedback." for name in names)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(rules)}
    _write_weights(path, state)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what `save_weights` wrote into a model, converted or plain."""
    model.load_state_dict(load_file(path))


def _write_weights(path: Path, state: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(to_safetensors({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}))
    os.replace(partial, path)
