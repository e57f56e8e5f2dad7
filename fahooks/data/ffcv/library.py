"""FFCV's compiled library: whether it is here, and its JPEG decoder.

It is loaded without importing `ffcv`, which compiles for seconds and changes the number of torch's threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy

from fahooks.plugins import InputError

INSTALL = "sudo apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install 'fahooks[ffcv]'"


def missing() -> str | None:
    """None where FFCV works; else a sentence that says why not, with the line that installs what is missing."""
    for name in ("ffcv", "numba"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return f"the package {name} is not installed: {INSTALL}"
    try:
        load()
    except InputError as error:
        return str(error)
    return None


@cache
def load() -> ctypes.CDLL:
    """FFCV's compiled library.

    Raises:
        InputError: it is not there, or a library of the system that it needs is not.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = [file for folder in folders for file in sorted(folder.glob("_libffcv*"))]
    try:
        if not found:
            raise FileNotFoundError(f"there is no _libffcv in {', '.join(map(str, folders)) or 'any package ffcv'}")
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise InputError(f"FFCV's library does not load ({error}): {INSTALL}") from error
    size = ctypes.c_uint32
    library.imdecode.argtypes = [ctypes.c_void_p, ctypes.c_uint64, size, size, ctypes.c_void_p, *[size] * 6, *[ctypes.c_bool] * 2]
    library.imdecode.restype = ctypes.c_int
    return library


def decode_jpeg(data: numpy.ndarray, height: int, width: int) -> numpy.ndarray | None:
    """The image in a JPEG file, uint8 [height, width, 3]; None if it is damaged in any way, or of another size.

    Arguments:
        data: the bytes of the file, uint8.
        height: of the image.
        width: of the image.
    """
    if jpeg_size(data) != (height, width):
        return None
    pixels = numpy.empty((height, width, 3), numpy.uint8)
    source, target = data.ctypes.data, pixels.ctypes.data
    failed = load().imdecode(source, data.size, height, width, target, height, width, 0, 0, 1, 1, False, False)
    return None if failed else pixels


def jpeg_size(data: numpy.ndarray) -> tuple[int, int]:
    """Height and width in the frame header of a JPEG file (ISO/IEC 10918-1, B.2.2); -1, -1 where there is none.

    FFCV's decoder scales an image that is larger than it was told, fills a part of the buffer where it is smaller, and where it
    was told 0 writes all of it. Numba compiles this too.

    Arguments:
        data: the bytes of the file, uint8.
    """
    at = 2
    while at + 8 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return 256 * int(data[at + 5]) + int(data[at + 6]), 256 * int(data[at + 7]) + int(data[at + 8])
        at += 1 if marker == 0xFF else 2 + 256 * int(data[at + 2]) + int(data[at + 3])
    return -1, -1
