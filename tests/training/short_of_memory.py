"""`python short_of_memory.py STEP MIB ARGUMENTS...`: fahooks with the memory that it has before a step, and so many MiB.

Step 0 is all that comes before the first one. What is imported on the way is imported before, since a library that can not be
mapped is another error.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch

import fahooks.cli
from fahooks.report import figures
from fahooks.training import commands, loop

IMPORTED = (sklearn.datasets.load_digits, figures, commands)


def limit(mib: int) -> None:
    """Let this process have no more than `mib` MiB beside what it has in use.

    Training keeps a heap of 2 GiB of addresses: what is free in it is taken.
    """
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    for block in (2**24, 2**20, 2**16):
        while malloc(block):
            pass
    resource.setrlimit(resource.RLIMIT_AS, (size + mib * 2**20, resource.RLIM_INFINITY))


def limited_before(step: int, mib: int) -> None:
    """Call `limit` before that step of training."""
    take_step, taken = loop.take_step, []

    def limited(*arguments: Any) -> Any:
        taken.append(step)
        if len(taken) == step:
            limit(mib)
        return take_step(*arguments)

    loop.take_step = limited


if __name__ == "__main__":
    step, mib, *arguments = sys.argv[1:]
    torch.nn.Conv2d(1, 8, 3)(torch.zeros(4, 1, 8, 8)).sum().backward()  # the threads of autograd have memory of their own
    if int(step):
        limited_before(int(step), int(mib))
    else:
        limit(int(mib))
    fahooks.cli.main(arguments)
