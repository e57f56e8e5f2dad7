from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fahooks.data.ffcv import library


def jpeg(pixels: numpy.ndarray) -> numpy.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=0)
    return numpy.frombuffer(file.getvalue(), numpy.uint8)


def test_a_jpeg_is_decoded_and_a_damaged_one_is_none():
    pixels = numpy.full((20, 30, 3), (200, 100, 50), numpy.uint8)
    data = jpeg(pixels)
    decoded = library.decode_jpeg(data, 20, 30)
    assert decoded is not None and numpy.abs(decoded.astype(int) - pixels).max() <= 3
    assert library.decode_jpeg(data[: len(data) // 2], 20, 30) is None
    assert library.decode_jpeg(numpy.zeros(100, numpy.uint8), 20, 30) is None


@pytest.mark.parametrize("size", [(20, 31), (40, 60), (10, 15), (21, 30), (0, 0), (0, 30), (-1, -1)])
def test_a_jpeg_of_another_size_is_none(size: tuple[int, int]):
    data = jpeg(numpy.zeros((20, 30, 3), numpy.uint8))
    assert library.decode_jpeg(data, *size) is None
    assert library.decode_jpeg(data, 20, 30) is not None, "control"


@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.booleans())
def test_the_size_of_a_jpeg_is_that_of_pillow(height: int, width: int, progressive: bool, more: bool):
    file = io.BytesIO()
    about = {"comment": b"c" * 70, "exif": b"Exif\0\0" + bytes(30), "icc_profile": bytes(70_000)} if more else {}
    Image.new("RGB", (width, height)).save(file, "JPEG", progressive=progressive, **about)
    data = numpy.frombuffer(file.getvalue(), numpy.uint8)
    assert library.jpeg_size(data) == (height, width)
    assert library.jpeg_size(data[:3]) == library.jpeg_size(data[100:]) == (-1, -1)


@given(st.binary(max_size=60))
def test_what_is_no_jpeg_has_no_size_that_could_be_asked_for(content: bytes):
    data = numpy.frombuffer(b"\xff\xd8\xff" + content, numpy.uint8)
    height, width = library.jpeg_size(data)
    assert (height, width) == (-1, -1) or (0 <= height < 2**16 and 0 <= width < 2**16)


def test_ffcv_is_not_imported_and_torch_keeps_its_threads():
    program = """
import sys, torch
torch.set_num_threads(2)
from fahooks.data.ffcv import kernel
assert "ffcv" not in sys.modules and torch.get_num_threads() == 2
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["ffcv", "numba"])
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, package: str):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    reason = library.missing()
    assert reason is not None
    assert package in reason and "apt-get install libopencv-dev" in reason and "pip install 'fahooks[ffcv]'" in reason


def test_a_library_of_the_system_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "_libffcv.so"
    broken.write_bytes(b"not a library")
    spec = importlib.util.find_spec("ffcv")
    assert spec is not None
    monkeypatch.setattr(spec, "submodule_search_locations", [str(tmp_path)])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "ffcv" else found(name))
    library.load.cache_clear()
    reason = library.missing()
    assert reason is not None and str(broken) in reason and "apt-get install libopencv-dev" in reason
    broken.unlink()
    reason = library.missing()
    assert reason is not None and str(tmp_path) in reason
