from __future__ import annotations

import errno
import fcntl
import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fahooks.data import Files, Images
from fahooks.data.decoding import CorruptFile
from fahooks.data.ffcv import library, writing
from fahooks.data.ffcv.beton import JPG, RAW, Beton, read
from fahooks.data.ffcv.library import decode_jpeg
from fahooks.data.ffcv.writing import Packing, sidecar, write
from fahooks.plugins import Failed, InputError


def written(path: Path, source: Images | Files, packing: Packing, **options: Any) -> Beton:
    write(path, "x", source, packing, **{"digest": "abc", "workers": 3, "corrupt": "refuse", **options})
    return read(path, channels=source.shape[0])


def test_ffcv_reads_what_is_written(tmp_path: Path, color: Images):
    threads = torch.get_num_threads()
    loader = pytest.importorskip("ffcv.loader")
    from ffcv.transforms import ToTensor  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    written(tmp_path / "x", color, Packing())
    pipelines = {"image": [loader.loader.Reader(str(tmp_path / "x")).handlers["image"].get_decoder_class()(), ToTensor()]}
    theirs = loader.Loader(str(tmp_path / "x"), batch_size=20, num_workers=1, drop_last=False, pipelines=pipelines)
    read_back = [(image.clone(), label.clone()) for image, label in theirs]
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat([image for image, _ in read_back]).permute(0, 3, 1, 2), color.pixels)
    assert torch.equal(torch.cat([label for _, label in read_back]).flatten(), color.labels)


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
def test_equal_images_give_equal_files_whatever_the_workers(tmp_path: Path, color: Images, mode: Any):
    for workers in (1, 4):
        written(tmp_path / str(workers), color, Packing(mode), workers=workers)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()


@pytest.mark.parametrize(("proportion", "expected"), [(0.0, 0), (0.3, 15), (1.0, 50)])
def test_a_proportion_becomes_jpeg(tmp_path: Path, color: Images, proportion: float, expected: int):
    assert (written(tmp_path / "x", color, Packing("proportion", proportion=proportion)).mode == JPG).sum() == expected


def test_a_jpeg_file_is_taken_as_it_is_and_others_are_packed(tmp_path: Path, photographs: Files):
    file = written(tmp_path / "x", photographs, Packing("jpg"))
    same = [file.packed(place).tobytes() == Path(path).read_bytes() for place, path in enumerate(photographs.paths)]
    assert same == [path.endswith("jpg") for path in photographs.paths] and not all(same)
    assert (file.mode == JPG).all()
    assert [(file.height[n], file.width[n]) for n in range(12)] == [(60 - n, 40 + n) for n in range(12)]


def test_a_jpeg_of_more_channels_than_are_wanted_is_packed_anew(tmp_path: Path, photographs: Files):
    """FFCV's decoder gives three channels, of which a gray image is the first: red, where it was colours that were packed."""
    gray = Files(photographs.paths, photographs.labels, side=32, channels=1)
    file = written(tmp_path / "x", gray, Packing("jpg"))
    for place in range(12):
        expected = gray.read(place)[0].numpy().astype(int)
        decoded = decode_jpeg(file.packed(place), *expected.shape)
        assert decoded is not None
        assert numpy.abs(decoded[:, :, 0] - expected).mean() < 3
    red, gray_values = (photographs.read(0)[0].numpy().astype(int), gray.read(0)[0].numpy().astype(int))
    assert numpy.abs(red - gray_values).mean() > 10, "control"
    # One with as many is taken as it is.
    assert file.packed(7).tobytes() == Path(photographs.paths[7]).read_bytes()


def test_a_jpeg_that_ffcv_takes_for_damaged_is_packed_anew(tmp_path: Path, photographs: Files):
    """Of bytes between its parts, which mean nothing, Pillow says nothing, and FFCV's decoder gives the image up."""
    path, place = Path(photographs.paths[3]), 3
    image = photographs.read(place)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes(20) + whole[-2:])
    assert torch.equal(photographs.read(place), image)
    assert decode_jpeg(numpy.frombuffer(path.read_bytes(), numpy.uint8), *image.shape[1:]) is None, "control"
    file = written(tmp_path / "x", photographs, Packing("jpg"))
    decoded = decode_jpeg(file.packed(place), *image.shape[1:])
    assert decoded is not None
    assert numpy.abs(decoded.astype(int) - image.permute(1, 2, 0).numpy()).mean() < 3


def test_raw_pixels_are_those_of_the_file(tmp_path: Path, photographs: Files):
    file = written(tmp_path / "x", photographs, Packing("raw"))
    assert (file.mode == RAW).all()
    for place in range(12):
        pixels = photographs.read(place).permute(1, 2, 0).numpy()
        assert (file.packed(place).reshape(pixels.shape) == pixels).all()


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"max_side": 30}, (30, 20)),
        ({"shorter_side": 30}, (45, 30)),
        ({"max_side": 30, "shorter_side": 25}, (30, 20)),
        ({"max_side": 999}, (60, 40)),
    ],
)
def test_images_are_scaled_down_and_never_up(tmp_path: Path, photographs: Files, mode: Any, options: Any, size: tuple[int, int]):
    file = written(tmp_path / "x", photographs, Packing(mode, **options))
    assert (file.height[0], file.width[0]) == size


@pytest.mark.parametrize(
    "options", [{"mode": "smart"}, {"quality": 0}, {"proportion": 1.5}, {"max_side": 0}, {"shorter_side": 70_000}]
)
def test_options_out_of_their_range_are_refused(options: Any):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        Packing(**options)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_a_corrupt_image_ends_it_by_name_or_has_no_bytes(tmp_path: Path, photographs: Files, mode: Any):
    broken = Path(photographs.paths[4])
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(CorruptFile, match=str(broken)):
        written(tmp_path / "x", photographs, Packing(mode))
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]
    file = written(tmp_path / "x", photographs, Packing(mode), corrupt="skip")
    assert (file.size == 0).nonzero()[0].tolist() == [4]
    assert '"corrupt": [\n  4\n ]' in sidecar(tmp_path / "x").read_text()


class Raising(Images):
    def read(self, place: int) -> torch.Tensor:
        if place == 7:
            raise RuntimeError("a dataset of somebody")
        return super().read(place)


def test_whatever_a_worker_raises_ends_it_and_leaves_nothing(tmp_path: Path, color: Images):
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="a dataset of somebody"):
        written(tmp_path / "x", Raising(color.pixels, color.labels), Packing())
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_it_and_leaves_nothing(tmp_path: Path, color: Images, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(Failed, match="No space left on device"):
        written(tmp_path / "x", color, Packing())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_is_refused(tmp_path: Path, color: Images):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can not be written.*data.loader_options.folder"):
        written(tmp_path / "file" / "x", color, Packing())


SLOW = """
import signal, sys, time
from pathlib import Path
import torch
from fahooks.data import Images
from fahooks.data.ffcv.writing import Packing, write

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what runs in the background

class Slow(Images):
    def read(self, place):
        if place == 5:
            print("writing", flush=True)
            for _ in range(3000):  # a minute, so that it ends where a test fails
                if Path(sys.argv[2]).exists():
                    break
                time.sleep(0.02)
        return super().read(place)

write(Path(sys.argv[1]), "x", Slow(torch.zeros(50, 3, 8, 8).byte(), torch.zeros(50).long()), Packing(), digest="abc", workers=1,
      corrupt="refuse")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_half_file_and_the_next_one_writes_it(tmp_path: Path, number: signal.Signals):
    path, enough = tmp_path / "x", tmp_path / "enough"
    command = [sys.executable, "-c", SLOW, str(path), str(enough)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        enough.touch()  # threads are waited for
        process.wait(60)
    enough.unlink()
    assert not path.exists() and not sidecar(path).exists()
    assert number == signal.SIGKILL or list(tmp_path.iterdir()) == []
    source = Images(torch.zeros(50, 3, 8, 8).byte(), torch.zeros(50).long())
    assert len(written(path, source, Packing())) == 50
    assert sorted(found.name for found in tmp_path.iterdir()) == ["x", "x.json"]


def held_by_another(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Do something once whoever asks for a file that is held is about to wait for it."""
    flock, asked = fcntl.flock, []

    def ask(file: Any, operation: int) -> None:
        if not asked:
            asked.append(file)
            with pytest.raises(BlockingIOError):
                flock(file, operation | fcntl.LOCK_NB)
            then()
        flock(file, operation)

    monkeypatch.setattr(writing.fcntl, "flock", ask)


def test_a_second_writer_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, enough = tmp_path / "x", tmp_path / "enough"
    command = [sys.executable, "-c", SLOW, str(path), str(enough)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        held_by_another(monkeypatch, enough.touch)
        written(path, Images(torch.ones(50, 3, 8, 8).byte(), torch.zeros(50).long()), Packing())
        assert process.wait(60) == 0
    assert numpy.all(read(path, channels=3).packed(0) == 0), "the first one's images were replaced"


def test_a_library_that_is_missing_is_not_taken_for_a_file_that_can_not_be_written(
    tmp_path: Path, photographs: Files, monkeypatch: pytest.MonkeyPatch
):
    spec = importlib.util.find_spec("ffcv")
    assert spec is not None
    empty = importlib.machinery.ModuleSpec("ffcv", spec.loader, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: empty)
    library.load.cache_clear()
    with pytest.raises(InputError, match="^FFCV's library does not load .there is no _libffcv .*apt-get install libopencv-dev"):
        written(tmp_path / "x", photographs, Packing("jpg"))
    assert list(tmp_path.glob("x*")) == []
    library.load.cache_clear()


def test_who_comes_too_late_to_write_leaves_nothing(tmp_path: Path, color: Images):
    for _ in range(2):
        written(tmp_path / "x", color, Packing())
    assert sorted(found.name for found in tmp_path.iterdir()) == ["x", "x.json"]


def test_who_waited_for_one_that_failed_holds_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    partial = tmp_path / "x.partial"
    first = writing._held(partial)

    def fails() -> None:
        partial.unlink()
        first.close()

    held_by_another(monkeypatch, fails)
    second = writing._held(partial)
    assert os.path.samestat(os.fstat(second.fileno()), partial.stat())
    second.close()


def test_who_has_written_leaves_the_file_that_the_next_one_holds(tmp_path: Path, color: Images, monkeypatch: pytest.MonkeyPatch):
    partial, held = tmp_path / "x.partial", []
    replace = Path.replace

    def then_the_next_one(self: Path, target: Path) -> Path:
        replaced = replace(self, target)
        if self == partial:
            held.append(writing._held(partial))
        return replaced

    monkeypatch.setattr(Path, "replace", then_the_next_one)
    written(tmp_path / "x", color, Packing())
    assert os.path.samestat(os.fstat(held[0].fileno()), partial.stat())
    held[0].close()


def test_a_file_of_that_name_that_is_not_whole_is_written_anew(tmp_path: Path, color: Images):
    """Such as one that was cut short, or of which nothing is known."""
    path = tmp_path / "x"
    written(path, color, Packing())
    whole, about = path.read_bytes(), sidecar(path).read_text()
    for content, known in ((whole[:-1], about), (whole, "{}"), (whole, "[]"), (whole, ""), (whole, about.replace("abc", "abd"))):
        path.write_bytes(content)
        sidecar(path).write_text(known)
        number = path.stat().st_ino
        assert not writing.is_whole(path, "abc")
        written(path, color, Packing())
        assert (path.read_bytes(), sidecar(path).read_text()) == (whole, about)
        assert writing.is_whole(path, "abc") and path.stat().st_ino != number


def test_an_image_larger_than_a_page_is_written_and_read(tmp_path: Path):
    source = Images(torch.randint(0, 256, (3, 3, 900, 900), dtype=torch.uint8), torch.zeros(3).long())
    file = written(tmp_path / "x", source, Packing())
    for place in range(3):
        assert (file.packed(place).reshape(900, 900, 3) == source.pixels[place].permute(1, 2, 0).numpy()).all()
    assert replace(file).start[1] % 2**21 == 0


def test_progress_is_lines_where_there_is_no_terminal(tmp_path: Path, color: Images, capfd: pytest.CaptureFixture[str]):
    written(tmp_path / "x", color, Packing())
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("wrote x: 50 images in ") and error.count("\n") == 1
