"""FFCV's file format, .beton, of which version 2 is read and written: labelled images.

A header, a description of each field, metadata of each example (where its image lies, how it is packed, its label), pages of
packed images, and a table of what was allocated in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy

from fahooks.plugins import InputError

VERSION = 2
PAGE = 2 * 2**20
JPG, RAW = 0, 1
# How FFCV numbers kinds of fields; to its own Loader a gray image is a custom one, for which it needs a decoder.
INTEGER, COLOR, CUSTOM = 1, 2, 255

HEADER = numpy.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = numpy.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = numpy.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
EXAMPLE = numpy.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = numpy.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_AT = HEADER.itemsize + 2 * FIELD.itemsize


@dataclass(frozen=True)
class Beton:
    """An opened file; an image of no bytes is one that could not be decoded when the file was written.

    Arguments:
        path: where it lies.
        data: its bytes, uint8, mapped into memory; whoever changes them changes a copy.
        start: int64 [N], where the bytes of each image begin.
        size: int64 [N], how many they are.
        mode: uint8 [N], JPG or RAW.
        height: int64 [N].
        width: int64 [N].
    """

    path: Path
    data: numpy.ndarray
    start: numpy.ndarray
    size: numpy.ndarray
    mode: numpy.ndarray
    height: numpy.ndarray
    width: numpy.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def packed(self, place: int) -> numpy.ndarray:
        """The bytes of the image at `place`."""
        return self.data[self.start[place] : self.start[place] + self.size[place]]


def read(path: Path, *, channels: int) -> Beton:
    """Open a file of images with 3 or 1 `channels`.

    Raises:
        InputError: it can not be read, or it is damaged: no address in it is trusted.
    """
    try:
        data = numpy.asarray(numpy.memmap(path, numpy.uint8, mode="c"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can not be read ({error}): remove it, and it is written anew") from error
    try:
        header = _table(data, HEADER, 0, 1)[0]
        if header["version"] != VERSION or header["num_fields"] != 2:
            raise ValueError(f"version {header['version']} with {header['num_fields']} fields")
        count, tables = int(header["num_samples"]), int(header["alloc_table_ptr"])
        examples = _table(data, EXAMPLE, METADATA_AT, count)
        image = examples["image"]
        allocated = _table(data, ALLOCATION, tables, max(0, len(data) - tables) // ALLOCATION.itemsize)
        size, allocated_at = numpy.zeros(count, numpy.int64), image["data_ptr"].astype(numpy.int64)
        owner = allocated["sample_id"].astype(numpy.int64)
        size[owner], allocated_at[owner] = allocated["size"], allocated["ptr"]
        start, height, width = (image[name].astype(numpy.int64) for name in ("data_ptr", "height", "width"))
        mode = image["mode"].copy()
        raw = (mode == RAW) & (size > 0)
        wrong = (start != allocated_at) | (start < METADATA_AT + examples.nbytes) | (size < 0) | (start > tables - size)
        wrong |= (raw & (size != height * width * channels)) | (mode > RAW)
        wrong |= (size > 0) & (height * width == 0)  # a decoder that is told 0 takes the size of the JPEG, and writes as much
        if wrong.any():
            raise ValueError(f"the address or size of image {int(wrong.argmax())}")
    except (ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{path} is damaged or of another kind ({error}): remove it, and it is written anew") from error
    return Beton(path, data, start, size, mode, height, width)


def _table(data: numpy.ndarray, kind: numpy.dtype, start: int, count: int) -> numpy.ndarray:
    if start + count * kind.itemsize > len(data):
        raise ValueError("it ends too early")
    return data[start : start + count * kind.itemsize].view(kind)
