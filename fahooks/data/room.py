"""Room in memory: how much images take once they are decoded, and how much there is."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from fahooks.data.examples import Files, Images
from fahooks.data.framing import Framing

# How many files are looked at to tell how large images are.
LOOKED_AT = 100


def decoded_bytes(source: Images | Files, framing: Framing | None, count: int, *, whole: bool) -> int:
    """Bytes that `count` images of `source` take once they are decoded.

    Arguments:
        source: where they lie.
        framing: what takes a box out of each, if anything.
        count: how many.
        whole: hold them as they are, so that a box can be drawn anew in every epoch; the size of files is estimated from a few.
    """
    if framing is None or (whole and isinstance(source, Images)):
        return count * math.prod(source.shape)
    if not whole:
        return count * source.shape[0] * framing.size**2
    assert isinstance(source, Files)
    looked_at = range(0, len(source), max(1, len(source) // LOOKED_AT))
    sizes = [size for place in looked_at if (size := _pixels(source.paths[place]))]
    return round(count * source.channels * sum(sizes) / max(1, len(sizes)))


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of memory that a new tensor may take, on a GPU or in the memory of this machine (or of its container)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _available()
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        left = _number(limit), _number(used)
        if left[0] is not None and left[1] is not None:
            free = min(free, max(0, left[0] - left[1]))
    return free


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(name: str) -> int | None:
    """What a file of the container's limits says; None where there is none."""
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return None


def _pixels(path: str) -> int:
    """Height times width of an image, by its header; 0 where it can not be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.width * file.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0
