from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from fahooks.data import Images
from fahooks.data.ffcv import beton
from fahooks.data.ffcv.writing import Packing, write
from fahooks.plugins import InputError


@pytest.fixture
def file(tmp_path: Path, color: Images) -> Path:
    path = tmp_path / "x.beton"
    write(path, "x", color, Packing(), digest="", workers=1, corrupt="refuse")
    return path


def test_what_was_written_is_read(file: Path, color: Images):
    found = beton.read(file, channels=3)
    assert len(found) == 50
    for place in (0, 49):
        pixels = found.packed(place).reshape(8, 8, 3)
        assert (pixels == color.pixels[place].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("at", [0, 8, 16, beton.METADATA_AT + 5, beton.METADATA_AT + 24 * 7 + 11])
def test_a_damaged_table_is_refused(file: Path, at: int):
    data = bytearray(file.read_bytes())
    data[at : at + 2] = b"\xff\xff"
    file.write_bytes(data)
    with pytest.raises(InputError, match="damaged.* remove it"):
        beton.read(file, channels=3)


@pytest.mark.parametrize("size", [0, 10, 5000, 2 * 2**20])
def test_a_file_that_ends_early_is_refused(file: Path, size: int):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match="remove it"):
        beton.read(file, channels=3)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="can not be read"):
        beton.read(tmp_path / "none.beton", channels=3)


def test_changes_to_an_image_do_not_reach_the_file(file: Path):
    before = file.read_bytes()
    beton.read(file, channels=3).packed(0)[:] = 0
    assert file.read_bytes() == before


def test_the_tables_are_those_of_ffcv():
    import torch

    threads = torch.get_num_threads()
    types = pytest.importorskip("ffcv.types")
    from ffcv.fields import IntField, RGBImageField  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    theirs = types.get_metadata_type([RGBImageField(), IntField()])
    assert (types.HeaderType, types.ALLOC_TABLE_TYPE, types.CURRENT_VERSION) == (beton.HEADER, beton.ALLOCATION, beton.VERSION)
    assert types.FieldDescType.itemsize == beton.FIELD.itemsize
    assert [field[1] for field in theirs.fields.values()] == [field[1] for field in dict(beton.EXAMPLE.fields or {}).values()]
    assert (theirs.itemsize, theirs[0]) == (beton.EXAMPLE.itemsize, beton.IMAGE)
    assert types.TYPE_ID_HANDLER[beton.COLOR] is RGBImageField and types.TYPE_ID_HANDLER[beton.INTEGER] is IntField
    assert types.TYPE_ID_HANDLER[beton.CUSTOM] is None


def test_an_address_outside_of_the_images_is_refused(file: Path):
    data = bytearray(file.read_bytes())
    examples = numpy.frombuffer(data, beton.EXAMPLE, 50, beton.METADATA_AT)
    examples["image"]["data_ptr"][3] = len(data) - 10
    file.write_bytes(data)
    with pytest.raises(InputError, match="address of image 3"):
        beton.read(file, channels=3)
