from __future__ import annotations

import os
import threading
from inspect import signature
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from PIL import Image

from fahooks.data import Augment, Batch, Examples, FfcvLoader, Files, Images, MemoryLoader, TorchvisionLoader, View, conformance
from fahooks.data.decoding import CorruptFile, CorruptFileWarning
from fahooks.data.ffcv import library, writing
from fahooks.data.ffcv import loader as ffcv_loader
from fahooks.plugins import InputError

AUGMENTS = [
    [],
    [{"crop": {"padding": 2}}, {"flip": {}}, {"cutout": {"size": 3}}],
    [{"random_resized_crop": {"size": 6}}, {"flip": {}}],
    [{"center_crop": {"size": 6, "resize": 7}}],
]


def view(channels: int = 3, **options: Any) -> View:
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    return View(**{"batch_size": 8, "training": True, "mean": zeros, "std": ones, "seed": 7, **options})


def batches(loader: Any, examples: Examples, seen: View) -> list[Batch]:
    loader.prepare(examples)
    with loader.open(examples, seen) as stream:
        stream.set_epoch(2)
        return list(stream)


def assert_same(ours: list[Batch], theirs: list[Batch], *, within: float = 0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for name in ("labels", "index", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.count == other.count
        assert (one.images - other.images).abs().mean() <= within


@pytest.mark.parametrize("steps", AUGMENTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", ["color", "gray"])
def test_raw_arrays_give_the_pixels_of_the_memory_loader(
    tmp_path: Path, request: pytest.FixtureRequest, images: str, steps: list[Any], training: bool
):
    source: Images = request.getfixturevalue(images)
    examples = Examples("x/train", source, torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:30])
    seen = view(source.shape[0], augment=Augment(steps, seed=2), training=training)
    expected = batches(MemoryLoader(), examples, seen)
    for workers in (1, 3):
        assert_same(batches(FfcvLoader(folder=str(tmp_path), workers=workers), examples, seen), expected)


@pytest.mark.parametrize("steps", AUGMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_raw_files_give_the_pixels_of_the_torchvision_loader(
    tmp_path: Path, photographs: Files, steps: list[Any], training: bool
):
    examples = Examples("x/train", photographs, torch.tensor([11, 3, 5, 7, 0, 1, 2, 9, 10]))
    seen = view(augment=Augment(steps, seed=2), training=training)
    expected = batches(TorchvisionLoader(workers=1), examples, seen)
    assert_same(batches(FfcvLoader(folder=str(tmp_path), mode="raw", workers=2), examples, seen), expected)
    assert_same(batches(FfcvLoader(folder=str(tmp_path), workers=2), examples, seen), expected, within=3)


@pytest.mark.parametrize("side", [16, 12])
def test_files_of_one_size_that_are_seen_whole_go_through_the_kernel(tmp_path: Path, side: int):
    paths = [str(tmp_path / f"{number}.png") for number in range(9)]
    for path in paths:
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()).save(path)
    examples = Examples("x/train", Files(paths, torch.arange(9), side=side), torch.arange(9))
    seen = view(augment=Augment([{"flip": {}}], seed=2))
    loader = FfcvLoader(folder=str(tmp_path), mode="raw", workers=2)
    assert_same(batches(loader, examples, seen), batches(TorchvisionLoader(workers=1), examples, seen))
    with loader.open(examples, seen) as stream:
        assert stream.size == ((16, 16) if side == 16 else None)
    with loader.open(examples, view(augment=Augment([{"random_resized_crop": {"size": 16}}]))) as stream:
        assert stream.size is None


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("workers", [1, 3])
def test_it_conforms_in_raw_mode(tmp_path: Path, check: Any, workers: int):
    check(FfcvLoader(folder=str(tmp_path / "ffcv"), mode="raw", workers=workers), tmp_path)


@pytest.mark.parametrize("check", [c for c in conformance.CHECKS if c is not conformance.same_arrays], ids=lambda c: c.__name__)
def test_it_conforms_with_jpeg(tmp_path: Path, check: Any):
    """But for pixels, which compression, and FFCV's faster decoder, change."""
    loader = FfcvLoader(folder=str(tmp_path / "ffcv"), mode="jpg", workers=3)
    check(loader, tmp_path, **({"exact": False} if "exact" in signature(check).parameters else {}))


def test_all_splits_of_a_source_share_a_file_which_is_written_once(
    tmp_path: Path, color: Images, capfd: pytest.CaptureFixture[str]
):
    loader = FfcvLoader(folder=str(tmp_path))
    for part in torch.arange(50).split(30):
        loader.prepare(Examples("x/train", color, part))
    assert capfd.readouterr().err.count("wrote") == 1
    FfcvLoader(folder=str(tmp_path)).prepare(Examples("x/train", Images(color.pixels, color.labels), torch.arange(50)))
    assert capfd.readouterr().err == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_what_goes_in_decides_which_file_it_is(tmp_path: Path, color: Images):
    def path(source: Images, **options: Any) -> Path:
        return FfcvLoader(folder=str(tmp_path), **options).path(Examples("x/train", source, torch.arange(50)))

    other = color.pixels.clone()
    other[0, 0, 0, 0] ^= 1
    paths = [path(color), path(Images(other, color.labels)), path(color, mode="jpg"), path(color, max_side=4)]
    paths += [path(color, mode="jpg", quality=50), path(Images(color.pixels, color.labels + 1))]
    assert len(set(paths)) == len(paths)
    assert path(color, mode="raw", workers=7) == paths[0]
    assert paths[0].name.startswith("x-train-") and paths[0].suffix == ".beton"


def test_a_file_that_was_cut_short_is_written_anew(tmp_path: Path, color: Images):
    loader, examples = FfcvLoader(folder=str(tmp_path)), Examples("x/train", color, torch.arange(50))
    loader.prepare(examples)
    path = loader.path(examples)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        loader.prepare(examples)
        assert path.read_bytes() == whole


def test_a_file_that_another_process_wrote_meanwhile_is_left_alone(
    tmp_path: Path, color: Images, monkeypatch: pytest.MonkeyPatch
):
    """One process has just seen that the file is cut short, when another one, that saw it too, has written it anew."""
    loader, examples = FfcvLoader(folder=str(tmp_path)), Examples("x/train", color, torch.arange(50))
    loader.prepare(examples)
    path = loader.path(examples)
    path.write_bytes(path.read_bytes()[:1000])
    asked: list[bool] = []
    theirs: list[IO[bytes]] = []

    def seen(*arguments: Any) -> bool:
        asked.append(writing.is_whole(*arguments))
        if len(asked) == 1:
            loader.prepare(examples)
            theirs.append(path.open("rb"))  # so that no other file has its number
        return asked[0]

    monkeypatch.setattr(ffcv_loader, "is_whole", seen)
    loader.prepare(examples)
    with theirs[0] as file:
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    assert sorted(found.name for found in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]


def test_a_file_that_was_written_without_corrupt_images_is_refused_where_these_are(tmp_path: Path, photographs: Files):
    for place in (9, 4, 5):
        Path(photographs.paths[place]).write_bytes(b"nothing")
    loader, examples = FfcvLoader(folder=str(tmp_path / "ffcv")), Examples("x/train", photographs, torch.arange(3))
    loader.prepare(examples, corrupt="skip")
    before = loader.path(examples).stat()
    loader.prepare(examples, corrupt="skip")
    for _ in range(2):  # as when it is written
        with pytest.raises(
            CorruptFile, match="^image 4, from .*4.jpg, could not be decoded, and 2 more: replace or remove it, or "
        ):
            loader.prepare(examples)
    assert loader.path(examples).stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_that_is_not_there_is_refused_with_what_writes_it(tmp_path: Path, color: Images):
    with pytest.raises(InputError, match="fahooks data prepare"):
        FfcvLoader(folder=str(tmp_path)).open(Examples("x/train", color, torch.arange(50)), view())


@pytest.mark.parametrize("steps", AUGMENTS[1:3])
def test_a_corrupt_file_is_refused_or_skipped(tmp_path: Path, photographs: Files, steps: list[Any]):
    Path(photographs.paths[4]).write_bytes(b"nothing")
    steps = [{"center_crop": {"size": 20}}] if "crop" in steps[0] else steps
    examples = Examples("x/train", photographs, torch.arange(12))
    loader = FfcvLoader(folder=str(tmp_path / "ffcv"))
    with pytest.raises(CorruptFile, match="4.jpg"):
        loader.prepare(examples)
    loader.prepare(examples, corrupt="skip")
    with pytest.raises(CorruptFile, match="4.jpg"):
        loader.open(examples, view(augment=Augment(steps)))
    with loader.open(examples, view(augment=Augment(steps), corrupt="skip")) as stream:
        with pytest.warns(CorruptFileWarning, match="^skipped: image 4, from .*4.jpg, .*: replace or remove it$"):
            given = list(stream)
    valid = torch.cat([batch.valid for batch in given])
    index = torch.cat([batch.index for batch in given])
    assert index[~valid].tolist() == [4]
    with loader.open(Examples("x/train", photographs, torch.arange(4)), view(augment=Augment(steps))) as stream:
        assert all(batch.valid.all() for batch in stream)


@pytest.mark.parametrize("corrupt", ["refuse", "skip"])
def test_a_file_damaged_since_is_refused_or_skipped(tmp_path: Path, color: Images, corrupt: Any):
    examples = Examples("x/train", color, torch.arange(40))
    loader = FfcvLoader(folder=str(tmp_path), mode="jpg", workers=2)
    loader.prepare(examples)
    with loader.open(examples, view(corrupt=corrupt)) as stream:
        stream.file.packed(13)[:40] = 0
        if corrupt == "refuse":
            with pytest.raises(CorruptFile, match="image 13 .*remove that file"):
                list(stream)
        else:
            with pytest.warns(CorruptFileWarning, match="image 13 "):
                given = list(stream)
            assert torch.cat([batch.index[~batch.valid] for batch in given]).tolist() == [13]
            assert all((batch.images[~batch.valid] == 0).all() for batch in given)


def test_no_thread_outlives_an_epoch_a_break_or_an_error(tmp_path: Path, color: Images):
    examples = Examples("x/train", color, torch.arange(50))
    loader = FfcvLoader(folder=str(tmp_path), workers=3, mode="jpg")
    loader.prepare(examples)
    threads = threading.active_count()
    stream = loader.open(examples, view())
    list(stream)
    for _ in range(30):
        for _ in stream:
            break
    stream.file.size[:] = 0
    with pytest.raises(CorruptFile):
        list(stream)
    stream.close()
    stream.close()
    assert threading.active_count() == threads


def test_without_ffcv_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "missing", lambda: "not here: pip install it")
    assert FfcvLoader.available() == "not here: pip install it"
    with pytest.raises(InputError, match="workers must be positive"):
        FfcvLoader(workers=0)
