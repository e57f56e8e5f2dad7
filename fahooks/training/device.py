"""The device that a run is on, and how exactly it computes there."""

from __future__ import annotations

import ctypes
import os

import torch

from fahooks.plugins import InputError
from fahooks.recipe import Recipe

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that train.device names; "auto" is a GPU where there is one.

    Raises:
        InputError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no GPU here: use train.device=cpu, or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def set_up(recipe: Recipe, device: torch.device) -> None:
    """Set the number of threads, keep freed memory on a CPU, and on a GPU let float32 products be rounded, or not.

    Those of convolutions are by default.

    Raises:
        InputError: the device knows no such precision.
    """
    precision = recipe.train.precision
    if precision == "tf32" and device.type == "cpu":
        raise InputError("train.precision=tf32 is a precision of GPUs, and this runs on the CPU: use fp32, bf16 or fp16")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if device.type == "cpu":
        keep_freed_memory()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What mallopt(3) calls them, and malloc.h numbers them."""


def keep_freed_memory() -> None:
    """Have the process keep the memory that it frees, for its next use, up to 2 GiB and until it ends.

    glibc gives memory back to the system where what is free at its end passes a threshold, so that by the chance of addresses a
    step finds its gradients' memory or has the system map and clear it anew, 4 KiB by 4 KiB. Blocks above 32 MiB are given back
    all the same. Nothing is done where the environment says what the allocator is to do, or the C library is another one.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context that a forward pass of that precision runs in."""
    reduced = REDUCED.get(precision)
    return torch.autocast(device.type, reduced, enabled=reduced is not None)


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss; enabled for float16 only."""
    return torch.amp.GradScaler(device.type, enabled=REDUCED.get(precision) is torch.float16)
