from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Literal

import numpy
import pytest
import torch
from PIL import Image

from fahooks.data.decoding import CorruptFile, decode

GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=GENERATOR)


def saved(path: Path, pixels: torch.Tensor = PIXELS, mode: str = "RGB") -> str:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert(mode)
    image.save(path)
    return str(path)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tiff"])
def test_lossless_files_keep_every_pixel(tmp_path: Path, name: str):
    assert torch.equal(decode(saved(tmp_path / name)), PIXELS)


def test_a_jpeg_has_the_pixels_that_pillow_gives_it(tmp_path: Path):
    path = saved(tmp_path / "x.jpg")
    expected = torch.from_numpy(numpy.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(decode(path), expected) and not torch.equal(expected, PIXELS)


def test_real_jpegs_have_the_pixels_that_pillow_gives_them(data_root: Path):
    files = sorted((data_root / "imagenet-sample").glob("*/*"))[:40]
    if not files:
        pytest.skip("there is no imagenet-sample under FAHOOKS_DATA")
    for file in files:
        with Image.open(file) as image:
            expected = torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(decode(str(file)), expected), file


@pytest.mark.parametrize(("mode", "name"), [("L", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("P", "x.gif"), ("I;16", "x.png")])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_gets_the_channels_asked_for(tmp_path: Path, mode: str, name: str, channels: Literal[1, 3]):
    if mode == "I;16":
        Image.new(mode, (30, 20), 300).save(tmp_path / name)
        path = str(tmp_path / name)
    else:
        path = saved(tmp_path / name, mode=mode)
    image = decode(path, channels)
    assert (image.shape, image.dtype) == ((channels, 20, 30), torch.uint8)


def test_what_is_wrong_is_one_line_that_can_be_written_whatever_the_name_of_the_file(tmp_path: Path):
    file = tmp_path / os.fsdecode(b"a\n\xff\xe2\x80\xa8b.png")
    file.write_bytes(b"damaged")
    with pytest.raises(CorruptFile) as error:
        decode(str(file))
    what = error.value.what
    assert what.startswith(f"{tmp_path}/a\\n\\udcff\\u2028b.png can not be decoded"), "control: names are said as they are"
    assert what.splitlines() == [what] and what.encode()


def test_the_advice_is_given_once_also_by_another_process(tmp_path: Path):
    error = CorruptFile("a.png can not be decoded")
    for again in (pickle.loads(pickle.dumps(error)), type(error)(*error.args)):
        assert (str(again), again.what) == (str(error), "a.png can not be decoded")
    assert str(error) == "a.png can not be decoded, or leave such files out with data.corrupt=skip"


def test_cmyk_jpegs_of_imagenet_are_read(tmp_path: Path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "x.jpeg")
    red, green, blue = decode(str(tmp_path / "x.jpeg")).float().mean((1, 2)).tolist()
    assert red > 200 and green < 50 and blue < 50


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.9])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, name: str, keep: float):
    path = Path(saved(tmp_path / name))
    data = path.read_bytes()
    decode(str(path))
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(CorruptFile, match=f"{path} can not be decoded .*: replace or remove it.* data.corrupt=skip") as caught:
        decode(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_refused(tmp_path: Path):
    with pytest.raises(CorruptFile, match="gone.jpg can not be decoded .*No such file"):
        decode(str(tmp_path / "gone.jpg"))
