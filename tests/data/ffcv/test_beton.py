from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


SIDE, COUNT = 8, 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of six images of 8x8 pixels: of raw ones, of JPEGs, and of both."""
    source = Images(torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8), torch.arange(COUNT))
    path = tmp_path_factory.mktemp("whole") / "x.beton"
    found = {}
    for mode in ("raw", "jpg", "proportion"):
        write(path, "x", source, Packing(mode), digest="", workers=1, corrupt="refuse")
        found[mode] = path.read_bytes()
        path.unlink()
    return found


def tables(data: bytearray) -> dict[str, numpy.ndarray]:
    """The tables of a file that is not damaged: changing them changes `data`."""
    header = numpy.frombuffer(data, beton.HEADER, 1)
    examples = numpy.frombuffer(data, beton.EXAMPLE, COUNT, beton.METADATA_AT)
    allocated = numpy.frombuffer(data, beton.ALLOCATION, COUNT, int(header["alloc_table_ptr"][0]))
    fields = {name: header[name] for name in beton.HEADER.names or ()}
    fields |= {name: examples["image"][name] for name in beton.IMAGE.names or ()}
    return fields | {name: allocated[name] for name in beton.ALLOCATION.names or ()}


def assert_within_bounds(file: beton.Beton) -> None:
    """Every image lies in the file, and decoding it changes nothing beside its own pixels."""
    from fahooks.data.ffcv.kernel import decode

    for place in range(len(file)):
        start, size, height, width = (int(found[place]) for found in (file.start, file.size, file.height, file.width))
        assert beton.METADATA_AT + len(file) * beton.EXAMPLE.itemsize <= start and start + size <= len(file.data)
        assert size == 0 or file.mode[place] in (beton.JPG, beton.RAW)
        assert size == 0 or file.mode[place] == beton.JPG or size == height * width * 3
        if height * width < 2**20:
            memory = numpy.full(height * width * 3 + 4 * SIDE * SIDE * 3, 7, numpy.uint8)
            decode(file, numpy.array([place]), memory[: height * width * 3].reshape(1, height, width, 3))
            assert (memory[height * width * 3 :] == 7).all(), "it wrote beyond the image"


def opened(path: Path, data: bytes) -> beton.Beton | None:
    """The file with that content; None where it is refused, as it should be."""
    path.unlink(missing_ok=True)  # what is mapped stays as it is
    path.write_bytes(data)
    try:
        return beton.read(path, channels=3)
    except InputError as error:
        assert "\n" not in str(error) and "remove it, and it is written anew" in str(error)
        return None


BEYOND = 10 * 2**20
WRONG = {
    "behind the file": {"data_ptr": BEYOND, "ptr": BEYOND},
    "behind the file by the last byte": {"data_ptr": -(SIDE * SIDE * 3) + 1, "ptr": -(SIDE * SIDE * 3) + 1},
    "in the header": {"data_ptr": 0, "ptr": 0},
    "in the tables": {"data_ptr": beton.METADATA_AT + 24, "ptr": beton.METADATA_AT + 24},
    "at a negative address": {"data_ptr": 2**64 - 100, "ptr": 2**64 - 100},
    "elsewhere than it was allocated": {"ptr": BEYOND},
    "of more bytes than there are": {"size": BEYOND},
    "of a negative number of bytes": {"size": 2**64 - 1},
    "of the most bytes": {"size": 2**63 - 1},
    "of another kind": {"mode": 2},
    "of no height": {"height": 0},
    "of no width": {"width": 0},
    "of no size": {"height": 0, "width": 0},
}


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_image_that_is_not_where_images_are_is_refused(whole: dict[str, bytes], mode: str, wrong: str, tmp_path: Path):
    data = bytearray(whole[mode])
    found = tables(data)
    end = int(found["alloc_table_ptr"][0])
    if mode == "jpg":  # so that bytes to read are as many as those of the raw ones
        found["size"][3] = SIDE * SIDE * 3
    for name, value in WRONG[wrong].items():
        found[name][3] = value if value >= 0 else end + value
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    with pytest.raises(InputError, match="the address or size of image 3.*: remove it, and it is written anew"):
        beton.read(path, channels=3)
    assert opened(path, whole[mode]) is not None, "control"


INTERESTING = st.sampled_from([0, 1, 2, 7, SIDE * SIDE * 3, 2**16 - 1, 2**21, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
FIELDS = [*(beton.HEADER.names or ()), *(beton.IMAGE.names or ()), *(beton.ALLOCATION.names or ())]
EDITS = st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, COUNT - 1), INTERESTING | st.integers(0, 2**23)), max_size=4)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["raw", "jpg", "proportion"]),
    edits=EDITS,
    moved=st.none() | st.tuples(st.integers(0, COUNT - 1), st.integers(0, 2**23), st.integers(0, 2**23)),
    cut=st.none() | st.integers(0, 2**22),
)
def test_whatever_its_tables_say_a_file_is_refused_or_decodes_within_bounds(
    whole: dict[str, bytes], mode: str, edits: list[Any], moved: tuple[int, int, int] | None, cut: int | None, tmp_path: Path
):
    data = bytearray(whole[mode])
    found = tables(data)
    for name, place, value in edits:
        field = found[name]
        field[place % len(field)] = value % 2 ** (8 * field.dtype.itemsize)
    if moved is not None:  # to another place, on which all tables agree
        place, found["data_ptr"][moved[0]], found["size"][moved[0]] = moved
        found["ptr"][place] = found["data_ptr"][place]
    file = opened(tmp_path / "x.beton", bytes(data[:cut]))
    if file is not None:
        assert_within_bounds(file)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["raw", "jpg", "proportion"]),
    at=st.integers(0, beton.METADATA_AT + COUNT * beton.EXAMPLE.itemsize) | st.integers(-COUNT * 24, -1),
    piece=st.binary(min_size=1, max_size=9),
)
def test_whatever_bytes_are_in_its_tables_a_file_is_refused_or_decodes_within_bounds(
    whole: dict[str, bytes], mode: str, at: int, piece: bytes, tmp_path: Path
):
    data = bytearray(whole[mode])
    at %= len(data)
    data[at : at + len(piece)] = piece
    file = opened(tmp_path / "x.beton", bytes(data[: len(whole[mode])]))
    if file is not None:
        assert_within_bounds(file)
