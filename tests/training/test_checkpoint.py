from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fahooks
from fahooks.plugins import InputError
from fahooks.training import checkpoint
from fahooks.training.checkpoint import Checkpoints, PassedOver, Progress, Unusable

RECIPE = {"name": "r", "seed": 0, "optim": {"lr": 0.1}}


def parts(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    fahooks.convert(model, "fa", seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    hooks = fahooks.attach(model, optimizer, fahooks.FreezeSigns(after=1), seed=seed)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "hooks": hooks}


def step(run: dict[str, Any]) -> None:
    run["optimizer"].zero_grad()
    run["model"](torch.randn(5, 4)).square().sum().backward()
    run["optimizer"].step()
    run["schedule"].step()


def best(folder: Path) -> Path:
    """A file of best weights."""
    checkpoint.save_weights(folder / "best", nn.Linear(2, 1))
    return folder / "best"


def test_a_restored_run_goes_on_with_the_same_bits(tmp_path: Path):
    run, checkpoints = parts(), Checkpoints(tmp_path / "c", RECIPE)
    step(run)
    progress = Progress(epoch=1, batch=2, step=7, best_epoch=1, best_error=3.5, seconds=2.0, loss_sum=0.1, wrong=3, seen=9)
    path = checkpoints.save(run, progress, best(tmp_path))
    step(run)
    other = parts(seed=5)
    matrix = "0.feedback.matrix"
    assert not torch.equal(other["model"].state_dict()[matrix], run["model"].state_dict()[matrix])
    found, state = checkpoints.newest()
    assert found == path
    assert checkpoint.restore(state, other, tmp_path / "best") == progress
    step(other)
    expected = run["model"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other["model"].state_dict().items())
    assert other["optimizer"].param_groups[0]["lr"] == run["optimizer"].param_groups[0]["lr"] == 0.025
    ours, theirs = (each["hooks"].state_dict() for each in (run, other))
    assert theirs["steps"] == ours["steps"] == 2
    assert all(torch.equal(side, ours["hooks"][0][name]) for name, side in theirs["hooks"][0].items())


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in checkpoints.paths()]


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (3, [30, 9, 2])])
def test_the_newest_ones_are_kept(keep: int, left: list[int], tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "c", RECIPE, keep)
    for number in (0, 2, 9, 30):
        checkpoints.save(parts(), Progress(step=number), tmp_path / "best")
    assert steps(checkpoints) == left


def test_too_old_ones_are_counted_from_the_one_that_a_run_goes_on_from(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "c", RECIPE, keep=9)
    paths = [checkpoints.save(parts(), Progress(step=number), tmp_path / "best") for number in (0, 2, 9, 30)]
    checkpoints.keep = 2
    checkpoints.prune(paths[2])  # the newest one is damaged, say
    assert steps(checkpoints) == [30, 9, 2]


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(tmp_path / "c", RECIPE)
    path = checkpoints.save(parts(), Progress(step=1), tmp_path / "best")
    before = path.read_bytes()

    def full_disk(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for number in (1, 2):
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(parts(), Progress(step=number), tmp_path / "best")
    assert [file.name for file in (tmp_path / "c").iterdir()] == [path.name]
    assert path.read_bytes() == before


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """One bit of a tensor is wrong: torch.load would not mind."""
    where = data.index(torch.full((64,), 1.5).numpy().tobytes())
    return data[: where + 5] + bytes([data[where + 5] ^ 1]) + data[where + 6 :]


def foreign(data: bytes) -> bytes:
    return b"PK\x03\x04 not a checkpoint"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is truncated or no checkpoint"),
        (foreign, "is truncated or no checkpoint"),
        (flipped, "is damaged: the checksum of .* is wrong"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_never_in_silence(damage: Any, message: str, tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "c", RECIPE, keep=2)
    run = {"model": nn.Module()}
    run["model"].register_buffer("pattern", torch.full((64,), 1.5))
    older, newer = (checkpoints.save(run, Progress(step=number), tmp_path / "best") for number in (1, 2))
    newer.write_bytes(damage(newer.read_bytes()))
    with pytest.warns(PassedOver, match=f"{message}.*; step-000000001.pt is taken in its place"):
        path, state = checkpoints.newest()
    assert (path, state["progress"]["step"]) == (older, 1)
    older.unlink()
    with pytest.raises(Unusable, match=message) as caught:
        checkpoints.newest()
    assert str(caught.value).endswith("is left to go on from: start the run anew")


def test_a_checkpoint_of_another_version_or_of_something_else_is_refused(tmp_path: Path):
    for content, message in (
        ({"version": 99}, "has version 99, this is for version 4"),
        ({"weights": torch.ones(2)}, "is no checkpoint of a run"),
        (torch.ones(2), "is no checkpoint of a run"),
    ):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(Unusable, match=message):
            checkpoint.read(tmp_path / "c.pt")


def test_a_checkpoint_of_another_recipe_is_refused_with_the_differences(tmp_path: Path):
    Checkpoints(tmp_path / "c", RECIPE).save(parts(), Progress(), tmp_path / "best")
    now = {**RECIPE, "name": "other", "optim": {"lr": 0.2, "momentum": 0.9}, "checkpoint": {"keep": 4}}
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path / "c", now).newest()
    assert str(caught.value).splitlines()[1:-1] == ["  optim.lr: 0.1 -> 0.2", "  optim.momentum: nothing -> 0.9"]
    assert Checkpoints(tmp_path / "c", {**RECIPE, "name": "other"}).newest()[0] is not None, "control"


def test_no_memory_is_no_fault_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(tmp_path / "c", RECIPE, keep=2)
    for number in (1, 2):
        checkpoints.save(parts(), Progress(step=number), tmp_path / "best")
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**58, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="allocate memory"):
        checkpoints.newest()


def test_a_checkpoint_that_does_not_fit_the_objects_is_refused(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "c", RECIPE)
    checkpoints.save(parts(), Progress(), tmp_path / "best")
    _, state = checkpoints.newest()
    with pytest.raises(Unusable, match="has the state of model, optimizer, schedule, hooks, and the run needs that of model"):
        checkpoint.restore(state, {"model": nn.Linear(2, 2)}, tmp_path / "best")
    with pytest.raises(Unusable, match="does not fit this run: model: .*weight"):
        checkpoint.restore(state, {**parts(), "model": nn.Linear(2, 2)}, tmp_path / "best")


def test_the_best_weights_are_put_back_to_those_that_the_checkpoint_knows(tmp_path: Path):
    run, checkpoints = parts(), Checkpoints(tmp_path / "c", RECIPE)
    file = best(tmp_path)
    known = file.read_bytes()
    checkpoints.save(run, Progress(epoch=1, best_epoch=1), file)
    checkpoint.save_weights(file, nn.Linear(2, 1))  # of epoch 2, whose checkpoint a crash took
    assert file.read_bytes() != known
    assert checkpoint.restore(checkpoints.newest()[1], run, file).best_epoch == 1
    assert file.read_bytes() == known
    checkpoints.save(run, Progress(), file)  # before any best epoch
    checkpoint.restore(checkpoints.newest()[1], run, file)
    assert not file.exists()


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_checkpoint_can_not_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"version": 4, "parts": Evil()}, tmp_path / "c.pt")
    with pytest.raises(Unusable, match="can not be read"):
        checkpoint.read(tmp_path / "c.pt")
    assert capsys.readouterr().out == ""


def test_best_weights_are_those_of_the_plain_model(tmp_path: Path):
    model = parts()["model"]
    checkpoint.save_weights(tmp_path / "best.safetensors", model)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    saved = load_file(tmp_path / "best.safetensors")
    assert set(saved) == set(plain.state_dict())
    checkpoint.load_weights(tmp_path / "best.safetensors", plain)
    other = parts(seed=3)["model"]
    matrix = other.state_dict()["0.feedback.matrix"].clone()
    checkpoint.load_weights(tmp_path / "best.safetensors", other)
    for loaded in (plain, other):
        assert torch.equal(loaded.state_dict()["2.weight"], model.state_dict()["2.weight"])
    assert torch.equal(other.state_dict()["0.feedback.matrix"], matrix)


def test_tied_weights_and_a_model_that_is_one_layer_can_be_saved(tmp_path: Path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    checkpoint.save_weights(tmp_path / "tied", tied)
    assert set(load_file(tmp_path / "tied")) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    single = nn.Linear(3, 3)
    fahooks.convert(single, "fa")
    checkpoint.save_weights(tmp_path / "single", single)
    assert set(load_file(tmp_path / "single")) == {"weight", "bias"}


class Shared(nn.Module):
    """One layer under two names, and one in a module that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.inner = nn.Sequential(nn.Linear(3, 3))
        self.again = self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.second(self.inner(self.first(x))))


def test_best_weights_of_shared_layers_load_into_the_plain_model(tmp_path: Path):
    model, plain = Shared(), Shared()
    fahooks.convert(model, "fa")
    assert "second.feedback.matrix" in model.state_dict()
    checkpoint.save_weights(tmp_path / "shared", model)
    for other in (plain, model):
        checkpoint.load_weights(tmp_path / "shared", other)
    assert torch.equal(plain(torch.ones(1, 3)), model(torch.ones(1, 3)))
