from __future__ import annotations

from pathlib import Path

import pytest
import torch.nn.functional as F

from fahooks.data.ffcv import library
from fahooks.plugins import InputError
from fahooks.recipe import load
from fahooks.training.dry_run import Cost, dry_run
from fahooks.training.setup import prepare

SMALL = ("data.limit=120", "data.batch_size=40", "train.device=cpu", "train.threads=1")


@pytest.fixture(scope="module")
def cost(tmp_path_factory: pytest.TempPathFactory) -> Cost:
    """What a small recipe costs."""
    return dry_run("quickstart", (*SMALL, "train.epochs=5"))


def test_two_steps_are_taken_on_the_batches_of_a_run(cost: Cost):
    setup = prepare(load("quickstart", (*SMALL, "train.epochs=5")))
    setup.train.set_epoch(1)
    batch = next(iter(setup.train))
    assert cost.loss == pytest.approx(F.cross_entropy(setup.model.train()(batch.images), batch.labels).item(), rel=1e-5)
    steps = {float(state["step"]) for state in cost.setup.optimizer.state.values()}
    assert steps == {2.0}


def test_the_estimate_adds_up_steps_validations_and_tests(cost: Cost):
    # 96 images in batches of 40: 3 steps an epoch; a batch for each of validation and test.
    assert (cost.setup.steps, len(cost.setup.validation), len(cost.setup.test)) == (15, 1, 1)
    assert cost.seconds == pytest.approx(15 * cost.step + (5 + 2) * cost.evaluation)
    cut = dry_run("quickstart", (*SMALL, "train.max_steps=4"))
    assert cut.seconds == pytest.approx(4 * cut.step + (2 + 2) * cut.evaluation)


def test_the_lines_say_what_was_asked(cost: Cost):
    said = dict(cost.lines())
    assert list(said) == ["data", "loader", "steps", "loss", "speed", "memory", "time"]
    assert said["data"] == "digits, 96 training, 24 validation and 360 test images of 1x8x8 (CxHxW)"
    assert said["loader"] == "memory: its images are arrays, which are in memory anyway"
    assert said["steps"] == "15, of 40 images, 3 an epoch"
    # conv1, conv2, dense and output with their biases, float32; Adam has two moments of each, and its counters.
    weights = 4 * (32 * 25 + 32 + 64 * 32 * 25 + 64 + 256 * 1024 + 1024 + 10240 + 10)
    assert said["memory"].startswith(
        f"weights {weights / 2**20:.1f} MiB, feedback 0.0 MiB, optimizer {2 * weights / 2**20:.1f} MiB"
    )


def test_an_epoch_of_one_batch_is_enough():
    assert dry_run("quickstart", ("data.limit=40", "data.batch_size=40", "train.device=cpu")).step > 0


def test_nothing_is_written_and_nothing_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    dry_run("quickstart", SMALL)
    with pytest.raises(InputError, match="mnist is not at .*; a dry run downloads nothing"):
        dry_run("mnist/fa", (f"data.root={tmp_path}",))
    with pytest.raises(InputError, match="optim.lr"):
        dry_run("quickstart", ("optim.lr=x",))
    monkeypatch.setattr(library, "missing", lambda: None)
    with pytest.raises(InputError, match="ffcv/digits-train-.* is not there: `fahooks data prepare` with the same recipe"):
        dry_run("quickstart", (*SMALL, "data.loader=ffcv", f"data.root={tmp_path}"))
    assert list(tmp_path.iterdir()) == []
