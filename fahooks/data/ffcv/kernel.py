"""The compiled kernel that decodes a batch. Numba keeps what it compiled, so that only the first process waits for it."""
# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
import warnings

import numpy
from llvmlite import binding
from numba import njit, types
from numba.core.errors import NumbaWarning

from fahooks.data.ffcv.beton import RAW, Beton
from fahooks.data.ffcv.library import jpeg_size, load

# By name, since a function that holds an address can not be kept for other processes.
NAME = "fahooks_ffcv_imdecode"
binding.add_symbol(NAME, ctypes.cast(load().imdecode, ctypes.c_void_p).value)
_decode_jpeg = types.ExternalFunction(
    NAME,
    types.int32(
        types.voidptr, types.uint64, types.uint32, types.uint32, types.voidptr, *[types.uint32] * 6, types.boolean, types.boolean
    ),
)
# Numba does not see in what it kept that a function of another file has changed: change this file too.
_jpeg_size = njit(nogil=True)(jpeg_size)


def decode(file: Beton, places: numpy.ndarray, pixels: numpy.ndarray) -> numpy.ndarray:
    """Decode images of one size, without holding Python's lock.

    Arguments:
        file: where they lie.
        places: int64 [n], which ones.
        pixels: uint8 [n, H, W, C], filled; black where an image is damaged.

    Returns:
        Bool [n]: which are not damaged.
    """
    scratch = numpy.empty((*pixels.shape[1:3], 3), numpy.uint8)
    good = numpy.ones(len(places), numpy.bool_)
    _decode(file.data, file.start, file.size, file.mode, file.height, file.width, places, pixels, scratch, good)
    return good


def _loop(data, start, size, mode, height, width, places, pixels, scratch, good):  # noqa: ANN001, ANN202
    high, wide, channels = pixels.shape[1:]
    for n in range(len(places)):
        place = places[n]
        packed = data[start[place] : start[place] + size[place]]
        good[n] = size[place] > 0 and height[place] == high and width[place] == wide
        if good[n] and mode[place] == RAW:
            pixels[n] = packed.reshape(high, wide, channels)
        elif good[n] and _jpeg_size(packed) != (high, wide):
            good[n] = False
        elif good[n]:
            target = pixels[n] if channels == 3 else scratch
            failed = _decode_jpeg(
                packed.ctypes.data, size[place], high, wide, target.ctypes.data, high, wide, 0, 0, 1, 1, False, False
            )
            good[n] = failed == 0
            if good[n] and channels == 1:
                pixels[n, :, :, 0] = scratch[:, :, 0]
        if not good[n]:
            pixels[n] = 0


def _compiled():  # noqa: ANN202
    try:
        return njit(nogil=True, cache=True)(_loop)
    except RuntimeError as error:  # no folder to keep it in can be written
        warnings.warn(f"compiled anew in every process: {error}; set NUMBA_CACHE_DIR", NumbaWarning, stacklevel=2)
        return njit(nogil=True)(_loop)


_decode = _compiled()
