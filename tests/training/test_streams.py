from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data.decoding import CorruptFileWarning
from fahooks.data.memory import MemoryLoader
from fahooks.plugins import InputError
from fahooks.recipe import Recipe, Source, load
from fahooks.training import streams as opening
from fahooks.training.setup import prepare
from fahooks.training.streams import SharedStreams

from .conftest import stored

Tiny = Callable[..., Recipe]


def test_images_are_normalised_by_those_that_are_trained_on(tiny: Tiny):
    setup = prepare(tiny())
    images = torch.cat([batch.images for batch in setup.train])
    assert abs(images.mean().item()) < 1e-5 and abs(images.std(correction=0).item() - 1) < 1e-4
    for other in (setup.validation, setup.test):
        assert torch.equal(other.mean, setup.train.mean) and torch.equal(other.std, setup.train.std)


def test_augmentation_follows_the_seed_of_the_recipe_and_the_epoch(tiny: Tiny):
    augment = "data.augment=[{crop: {padding: 2}}]"
    first, again, other = (prepare(tiny(augment, f"seed={s}")).train for s in (0, 0, 1))
    pixels, index = stored(first)[:50], torch.arange(50)
    assert torch.equal(first.view.augment.train(pixels, 1, index), again.view.augment.train(pixels, 1, index))
    assert not torch.equal(first.view.augment.train(pixels, 1, index), other.view.augment.train(pixels, 1, index))
    assert not torch.equal(first.view.augment.train(pixels, 1, index), first.view.augment.train(pixels, 2, index))


def test_a_crop_that_does_not_fit_the_images_is_one_line(tiny: Tiny):
    with pytest.raises(InputError, match="a crop of 9x9 pixels does not fit into images of 8x8 with padding 0"):
        prepare(tiny("data.augment=[{crop: {size: 9}}]"))


def test_large_images_are_evaluated_in_batches_as_they_are_trained_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    assert [prepare(tiny()).validation.view.batch_size, prepare(tiny()).train.view.batch_size] == [500, 32]
    monkeypatch.setattr(opening, "SMALL_IMAGE", 63)
    assert prepare(tiny()).test.view.batch_size == prepare(tiny()).validation.view.batch_size == 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small images of two classes, half of them bright."""
    for number in range(40):
        label = "ab"[number % 2]
        (tmp_path / "mine" / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 9), 100 + 5 * number).save(tmp_path / "mine" / label / f"{number}.png")
    return tmp_path


def of_files(folder: Path, *more: str) -> tuple[str, ...]:
    options = "data.dataset_options={path: mine, size: 8, channels: 1, test: 0.25}"
    return ("data.dataset=imagefolder", options, f"data.root={folder}", "data.validation=6", "data.limit=null", *more)


def test_a_folder_of_images_is_trained_on(tiny: Tiny, folder: Path):
    setup = prepare(tiny(*of_files(folder)))
    assert (setup.train.images, setup.validation.images, setup.test.images) == (24, 6, 10)
    assert setup.recipe.data.loader == "memory"
    assert setup.choices["data.loader"].startswith("memory: decoded, its 40 images take 0.00 GB")
    assert setup.recipe.data.dataset_options == {"path": "mine", "size": 8, "channels": 1, "test": 0.25, "test_seed": 0}
    assert load(Source("resolved.yaml", setup.recipe.as_yaml())) == setup.recipe


def test_all_loaders_give_the_same_batches(tiny: Tiny, folder: Path):
    augment = "data.augment=[{random_resized_crop: {size: 8}}, {flip: {}}]"
    memory = prepare(tiny(*of_files(folder, augment, "data.loader=memory")))
    threads = prepare(tiny(*of_files(folder, augment, "data.loader=torchvision", "data.loader_options.workers=2")))
    assert threads.choices == {} and threads.recipe.data.loader_options == {"workers": 2}
    for one, other in ((memory.train, threads.train), (memory.validation, threads.validation), (memory.test, threads.test)):
        for stream in (one, other):
            stream.set_epoch(3)
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours.images, theirs.images) and torch.equal(ours.index, theirs.index)


def test_a_corrupt_file_is_refused_or_skipped_as_the_recipe_says(tiny: Tiny, folder: Path):
    for file in sorted((folder / "mine" / "a").iterdir())[:2]:
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"\.png can not be decoded .*data.corrupt=skip"):
        prepare(tiny(*of_files(folder)))
    with pytest.warns(CorruptFileWarning, match="skipped"):
        setup = prepare(tiny(*of_files(folder, "data.corrupt=skip")))
        streams = (setup.train, setup.validation, setup.test)
        assert sum(int(batch.valid.sum()) for stream in streams for batch in stream) == 38


def test_a_loader_that_does_not_work_here_is_an_error_with_the_way_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MemoryLoader, "available", lambda: "memory is not installed: pip install memory")
    with pytest.raises(InputError, match="data.loader=memory does not work here: memory is not installed: pip install memory"):
        prepare(tiny("data.loader=memory"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.dataset_options={sise: 3}"], "data.dataset_options.sise: dataset 'digits' has no such option"),
        (["data.dataset=imagefolder"], "data.dataset_options.path: is missing"),
        (["data.dataset=imagefolder", "data.dataset_options={path: 3}"], "data.dataset_options.path: must be a string"),
        (["data.dataset=imagefolder", "data.dataset_options={path: x, download: true}"], "has no such option"),
        (["data.loader_options={workers: 3}"], "data.loader_options: needs data.loader to be one by name, and not auto"),
        (["data.loader=torchvision", "data.loader_options={workers: 0}"], "workers must be positive .got 0."),
        (["data.loader=torchvision", "data.loader_options={worker: 1}"], "no such option .got 1. - did you mean 'workers'"),
        (["data.loader=memory", "data.loader_options=3"], "data.loader_options: must be a mapping"),
        (["data.corrupt=ignore"], "data.corrupt: must be 'refuse' or 'skip'"),
        (["data.augment=[{flip: {}}, {center_crop: {size: 4}}]"], "must be the first step"),
    ],
)
def test_options_of_datasets_and_loaders_are_checked(tiny: Tiny, overrides: list[str], problem: str):
    with pytest.raises(InputError, match=problem):
        prepare(tiny(*overrides))


def test_runs_in_a_row_share_what_they_have_in_common(tiny: Tiny):
    shared = SharedStreams()
    first = shared.open(tiny())
    batches = [batch.index for batch in first.train]
    first.train.set_epoch(3, start=len(first.train))
    assert not list(first.train), "control: the run before has left it at the end"
    again = shared.open(tiny("optim.lr=0.1", "train.epochs=7", "feedback=[{rule: bp}]"))
    assert again is first
    assert all(torch.equal(ours, theirs) for ours, theirs in zip((b.index for b in again.train), batches, strict=True))
    for other in ("seed=1", "data.limit=100", "train.channels_last=true", "data.batch_size=16"):
        assert shared.open(tiny(other)) is not first
        assert shared.open(tiny(other)).dataset is first.dataset
    shared.close()
    shared.close()
