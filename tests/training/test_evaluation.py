from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from fahooks.data import Examples, View
from fahooks.data.decoding import CorruptFileWarning
from fahooks.data.ffcv import library
from fahooks.data.memory import MemoryLoader
from fahooks.plugins import InputError
from fahooks.recipe import load, read_file
from fahooks.training import checkpoint, commands
from fahooks.training.checkpoint import PassedOver
from fahooks.training.evaluation import Weights, evaluate_run
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare

SMALL = ("data.limit=300", "train.epochs=3", "train.threads=1", "train.device=cpu", "probes.every=null", "optim.lr=3e-3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("trained") / "run"
    commands.start("quickstart", SMALL, path)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for a test to change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_best_and_last_weights_have_the_errors_that_the_run_found(trained: Path):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = RunDirectory(trained).read_status()["result"]
    best, last = evaluate_run(trained), evaluate_run(trained, "last")
    assert (best.test["error"], best.validation["error"]) == (result["test_error"], result["validation_error"])
    assert last.test["error"] == result["final_test_error"]
    assert (best.step, last.step) == (None, RunDirectory(trained).rows("epoch")[-1]["step"])
    assert (best.test["images"], best.validation["images"]) == (360, 60)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_an_average_of_the_weights_is_what_is_evaluated(tmp_path: Path):
    commands.start("quickstart", (*SMALL, "train.epochs=1", "train.ema=0.9"), tmp_path / "run")
    result = RunDirectory(tmp_path / "run").read_status()["result"]
    expected: dict[Weights, float] = {"best": result["test_error"], "last": result["final_test_error"]}
    for weights, error in expected.items():
        assert evaluate_run(tmp_path / "run", weights).test["error"] == error


def test_images_that_are_skipped_do_not_count(damaged: tuple[str, ...], tmp_path: Path):
    with pytest.warns(CorruptFileWarning):
        commands.start("quickstart", (*SMALL, *damaged, "train.epochs=1"), tmp_path / "run")
        found = evaluate_run(tmp_path / "run")
        setup = prepare(load(read_file(tmp_path / "run" / "resolved.yaml")))
        assert found.test["images"] == sum(int(batch.valid.sum()) for batch in setup.test) < setup.test.images
    assert found.test["skipped"] == setup.test.images - found.test["images"] == len(setup.test.skipped)


def test_other_images_are_normalised_as_those_that_were_trained_on(trained: Path):
    other = evaluate_run(trained, overrides=("data.limit=40",))
    assert other.validation["images"] == 8
    own = prepare(load(str(trained / "resolved.yaml")))
    checkpoint.load_weights(trained / "best.safetensors", own.model)
    with torch.no_grad():
        losses = [F.cross_entropy(own.model.eval()(b.images), b.labels, reduction="sum") for b in own.test]
    assert other.test["loss"] == pytest.approx(torch.stack(losses).sum().item() / 360, rel=1e-6)
    few = prepare(load(str(trained / "resolved.yaml"), ("data.limit=40",)))
    assert not torch.equal(few.test.mean, own.test.mean), "control: the other images have statistics of their own"


def test_other_images_may_lie_elsewhere_than_those_that_were_trained_on(damaged: tuple[str, ...], tmp_path: Path):
    theirs = Path(shutil.copytree(tmp_path / "mine", tmp_path / "elsewhere" / "theirs"))
    overrides = (f"data.root={theirs.parent}", f"data.dataset_options.path={theirs.name}")
    with pytest.warns(CorruptFileWarning):
        commands.start("quickstart", (*SMALL, *damaged, "train.epochs=1"), tmp_path / "run")
        there, here = evaluate_run(tmp_path / "run", overrides=overrides), evaluate_run(tmp_path / "run")
    assert there.test == here.test
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(InputError, match="those that were trained on, and of these .*mine"):
        evaluate_run(tmp_path / "run", overrides=overrides)


def test_images_of_other_channels_are_refused_before_anything_is_written(trained: Path, damaged: tuple[str, ...], tmp_path: Path):
    before = set(tmp_path.rglob("*"))
    loader = "data.loader=torchvision" if library.missing() else "data.loader=ffcv"
    with pytest.raises(InputError, match="has images of 3 channels, .* as images of 1: name"):
        evaluate_run(trained, overrides=(*damaged, "data.dataset_options.channels=3", loader))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "weights", "message"),
    [
        (lambda run: shutil.rmtree(run), "best", "is no run directory"),
        (lambda run: (run / "best.safetensors").unlink(), "best", "has no best weights yet"),
        (lambda run: (run / "best.safetensors").write_bytes(b"x" * 100), "best", "best.safetensors' is damaged"),
        (lambda run: _truncate(run / "best.safetensors"), "best", "best.safetensors' is damaged"),
        (lambda run: _truncate(*(run / "checkpoints").iterdir()), "last", "is truncated or no checkpoint.*\n.*is left to go on"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "last", "has no checkpoint"),
        (lambda run: (run / "resolved.yaml").write_bytes(b"\xff"), "best", "resolved.yaml' can not be read"),
        (lambda run: (run / "resolved.yaml").write_text("name: x"), "best", "resolved.yaml:1: model: is missing"),
        (lambda run: _widen(run), "best", "best.safetensors' is damaged, or of another model"),
        (lambda run: _widen(run), "last", "was written with another recipe .*\n  model.classes: 10 -> 12"),
    ],
)
def test_what_is_damaged_is_one_clear_error(damage: Callable[[Path], None], weights: Weights, message: str, run: Path):
    damage(run)
    with pytest.raises(InputError, match=message) as caught:
        evaluate_run(run, weights)
    assert "Traceback" not in str(caught.value)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path):
    run = tmp_path / "run"
    commands.start("quickstart", (*SMALL, "train.epochs=2", "checkpoint.keep=2"), run)
    whole = [row["validation_error"] for row in RunDirectory(run).rows("epoch")]
    older, newer = sorted((run / "checkpoints").iterdir())
    assert evaluate_run(run, "last").step == int(newer.stem.removeprefix("step-"))
    _truncate(newer)
    with pytest.warns(PassedOver, match=f"{newer.name}' is truncated .*; {older.name} is taken in its place"):
        found = evaluate_run(run, "last")
    assert (found.step, found.validation["error"]) == (int(older.stem.removeprefix("step-")), whole[0])


def test_images_are_loaded_and_opened_once(trained: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    opens = MemoryLoader.open

    def count(loader: MemoryLoader, examples: Examples, view: View) -> Any:
        opened.append(examples.name)
        return opens(loader, examples, view)

    monkeypatch.setattr(MemoryLoader, "open", count)
    for overrides in ((), ("data.limit=40",)):
        opened.clear()
        evaluate_run(trained, overrides=overrides)
        assert opened == ["digits/train", "digits/train", "digits/test"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1", "an evaluation may change data, train.device, train.threads, and no other key"),
        ("database=1", "an evaluation may change"),
        ("data.dataset=digit", "no dataset is named 'digit'"),
        (
            "data.augment=[{crop: {size: 4}}]",
            "does not run on images of shape 1x4x4 .*; name images like those that it was trained on, digits$",
        ),
    ],
)
def test_what_can_not_be_evaluated_is_refused(override: str, message: str, trained: Path):
    with pytest.raises(InputError, match=message):
        evaluate_run(trained, overrides=(override,))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _widen(run: Path) -> None:
    recipe = yaml.safe_load((run / "resolved.yaml").read_text())
    recipe["model"]["classes"] = 12
    (run / "resolved.yaml").write_text(yaml.safe_dump(recipe))
