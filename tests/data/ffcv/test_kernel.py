from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from fahooks.data import Images
from fahooks.data.ffcv.beton import JPG, RAW, read
from fahooks.data.ffcv.library import decode_jpeg
from fahooks.data.ffcv.writing import Packing, write

PLACES = numpy.array([7, 0, 39, 7, 5, 21])


@pytest.mark.parametrize("images", ["color", "gray"])
@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
def test_it_decodes_what_is_asked_for(tmp_path: Path, request: pytest.FixtureRequest, images: str, mode: str):
    from fahooks.data.ffcv.kernel import decode

    source: Images = request.getfixturevalue(images)
    write(tmp_path / "x", "x", source, Packing(mode, quality=100), digest="", workers=2, corrupt="refuse")  # pyright: ignore
    file, channels = read(tmp_path / "x", channels=source.shape[0]), source.shape[0]
    pixels = numpy.full((len(PLACES), 8, 8, channels), 7, numpy.uint8)
    assert decode(file, PLACES, pixels).all()
    for place, found in zip(PLACES, pixels, strict=True):
        original = source.pixels[place].permute(1, 2, 0).numpy()
        if file.mode[place] == RAW:
            assert (found == original).all()
        else:
            one_by_one = decode_jpeg(file.packed(place), 8, 8)
            assert one_by_one is not None and (found == one_by_one[:, :, :channels]).all()
            assert 0 < numpy.abs(found.astype(int) - original).mean() < 60
    assert set(file.mode[PLACES]) == {"raw": {RAW}, "jpg": {JPG}, "proportion": {JPG, RAW}}[mode]


def test_what_is_damaged_is_black_and_said_so(tmp_path: Path, color: Images):
    from fahooks.data.ffcv.kernel import decode

    write(tmp_path / "x", "x", color, Packing("jpg"), digest="", workers=1, corrupt="refuse")
    file = read(tmp_path / "x", channels=3)
    file.packed(0)[:50] = 0
    file.size[39] = 0
    pixels = numpy.full((6, 8, 8, 3), 7, numpy.uint8)
    assert decode(file, PLACES, pixels).tolist() == [True, False, False, True, True, True]
    assert (pixels[1:3] == 0).all() and (pixels[0] == pixels[3]).all() and (pixels[0] > 0).any()


@pytest.mark.parametrize("images", ["color", "gray"])
def test_a_jpeg_of_another_size_than_its_table_says_is_damaged(tmp_path: Path, request: pytest.FixtureRequest, images: str):
    from fahooks.data.ffcv.kernel import decode

    source: Images = request.getfixturevalue(images)
    write(tmp_path / "x", "x", source, Packing("jpg"), digest="", workers=1, corrupt="refuse")
    file = read(tmp_path / "x", channels=source.shape[0])
    for height, width in ((16, 16), (8, 16), (4, 4), (9, 8)):
        file.height[:], file.width[:] = height, width
        pixels = numpy.full((6, height, width, source.shape[0]), 7, numpy.uint8)
        assert not decode(file, PLACES, pixels).any()
        assert (pixels == 0).all()


def test_a_second_process_takes_what_the_first_compiled(tmp_path: Path):
    program = """
import numpy, sys
from pathlib import Path
from fahooks.data.ffcv import kernel
from fahooks.data.ffcv.beton import Beton
none = numpy.zeros(0, numpy.int64)
file = Beton(Path(), numpy.zeros(0, numpy.uint8), none, none, none.astype(numpy.uint8), none, none)
kernel.decode(file, none, numpy.zeros((0, 8, 8, 3), numpy.uint8))
print(sum(kernel._decode.stats.cache_hits.values()), sum(kernel._decode.stats.cache_misses.values()))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]], runs[0].stderr
