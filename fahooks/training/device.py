"""The device that a run is on, and how exactly it computes there."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import warnings

import torch

from fahooks.data.threads import usable_cores
from fahooks.plugins import Doubtful, InputError
from fahooks.recipe import Recipe
from fahooks.rules import workspace
from fahooks.training.distributed import rank

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that train.device names; "auto" is a GPU where there is one, for each of the processes that torchrun started.

    Raises:
        InputError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no GPU here: use train.device=cpu, or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    one_each = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # maybe: whoever started them shows each its own
    if processes > gpus and not one_each:  # NCCL has one process a GPU
        what = f"torchrun started {processes} processes here, and there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}"
        raise InputError(f"{what}: start one for each (--nproc-per-node {gpus}), or use train.device=cpu")
    return torch.device("cuda", torch.cuda.current_device())


def set_up(recipe: Recipe, device: torch.device) -> None:
    """Set the number of threads, tune the allocator on a CPU, and on a GPU let float32 products be rounded, or not.

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
        set_threads(recipe.train.threads, "train.threads")
    if device.type == "cpu":
        tune_allocator()


def set_threads(count: int, what: str) -> None:
    """Let torch compute with `count` threads on a CPU; `what` asked for them, and of more than there are cores it is warned."""
    if count > usable_cores() and rank() == 0:
        cores = f"{usable_cores()} {'core' if usable_cores() == 1 else 'cores'}"
        warnings.warn(f"{what}={count:,} on {cores} is slower than {what}={usable_cores()}", Doubtful, stacklevel=3)
    torch.set_num_threads(count)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""What mallopt(3) calls them, and malloc.h numbers them."""

LARGEST_BLOCK, LARGE_PAGE, HEAP = 2**25, 2**21, 2**31 - 2**25  # mallopt takes ints
"""Bytes from which on glibc maps a block by itself once the heap is full, of a large page, and of the heap that is kept."""

OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables of the environment that say what the allocator is to do."""


def tune_allocator() -> None:
    """Have the calling thread keep the memory that it frees, up to 2 GiB and until the process ends, and take it in large pages.

    glibc gives memory back to the system where what is free at its end passes a threshold, so that by the chance of addresses a
    step finds its gradients' memory or has the system map and clear it anew, 4 KiB by 4 KiB. And weights are read once a pass,
    with a page to be looked up every 4 KiB, or every 2 MiB. Blocks above 32 MiB may still be given back. Nothing is done
    where the environment says what the allocator is to do, or the C library is another one; nothing is gained where another
    library serves memory, or in a thread with a heap of its own, as all but the first have.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OF_THE_USER):
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    libc.mallopt(M_TRIM_THRESHOLD, HEAP)
    # The heap grows at once to its full size, which takes no memory yet, since what grows later is not what was asked for here.
    begin = libc.sbrk(0)
    libc.mallopt(M_TOP_PAD, HEAP - 2 * LARGEST_BLOCK)
    block = libc.malloc(ctypes.c_size_t(LARGEST_BLOCK - LARGE_PAGE))
    libc.free(ctypes.c_void_p(block))
    libc.mallopt(M_TOP_PAD, 2**17)  # glibc's default
    end = libc.sbrk(0)
    if block is not None and block < end:  # of this heap: others lie above it
        workspace.leave_to_allocator()
    first, last = -(-begin // LARGE_PAGE), end // LARGE_PAGE
    if last > first:  # not where the heap can not grow, or did before
        # The kernel may have no large pages: then all is as it was.
        libc.madvise(ctypes.c_void_p(first * LARGE_PAGE), ctypes.c_size_t((last - first) * LARGE_PAGE), mmap.MADV_HUGEPAGE)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context that a forward pass of that precision runs in."""
    reduced = REDUCED.get(precision)
    return torch.autocast(device.type, reduced, enabled=reduced is not None)


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss; enabled for float16 only."""
    return torch.amp.GradScaler(device.type, enabled=REDUCED.get(precision) is torch.float16)
