from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

import fahooks
from fahooks.hooks import Attachment
from fahooks.plugins import InputError
from fahooks.training import checkpoint
from fahooks.training.checkpoint import Progress

Parts = tuple[nn.Module, Optimizer, torch.optim.lr_scheduler.StepLR, Attachment]


def parts(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    fahooks.convert(model, "fa", seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    hooks = fahooks.attach(model, optimizer, fahooks.FreezeSigns(after=1), seed=seed)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), hooks


def step(model: nn.Module, optimizer: Optimizer, schedule: torch.optim.lr_scheduler.StepLR, hooks: Attachment) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    schedule.step()


def best(folder: Path) -> Path:
    """A file of best weights."""
    checkpoint.save_weights(folder / "best", nn.Linear(2, 1))
    return folder / "best"


def test_a_restored_run_goes_on_with_the_same_bits(tmp_path: Path):
    run = parts()
    step(*run)
    checkpoint.save(
        tmp_path / "c.pt", *run, Progress(epoch=1, step=7, best_epoch=1, best_error=3.5, seconds=2.0), best=best(tmp_path)
    )
    step(*run)
    other = parts(seed=5)
    assert not torch.equal(other[0].state_dict()["0.feedback.matrix"], run[0].state_dict()["0.feedback.matrix"])
    progress = checkpoint.restore(tmp_path / "c.pt", *other, best=tmp_path / "best")
    assert progress == Progress(epoch=1, step=7, best_epoch=1, best_error=3.5, seconds=2.0)
    step(*other)
    expected = run[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other[0].state_dict().items())
    assert other[1].param_groups[0]["lr"] == run[1].param_groups[0]["lr"] == 0.025
    state = run[3].state_dict()
    assert other[3].state_dict()["steps"] == state["steps"] == 2
    assert all(torch.equal(side, state["hooks"][0][name]) for name, side in other[3].state_dict()["hooks"][0].items())


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = parts()
    checkpoint.save(tmp_path / "c.pt", *run, Progress(epoch=1), best=best(tmp_path))
    before = (tmp_path / "c.pt").read_bytes()

    def full_disk(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "c.pt", *run, Progress(epoch=2), best=best(tmp_path))
    assert (tmp_path / "c.pt").read_bytes() == before


def test_a_damaged_or_foreign_checkpoint_is_one_line(tmp_path: Path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="can not be read .*: start the run anew"):
        checkpoint.restore(tmp_path / "c.pt", *parts(), best=tmp_path / "best")
    torch.save({"version": 99}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="has version 99, this is for version 3"):
        checkpoint.restore(tmp_path / "c.pt", *parts(), best=tmp_path / "best")


def test_the_best_weights_are_put_back_to_those_that_the_checkpoint_knows(tmp_path: Path):
    run = parts()
    file = best(tmp_path)
    known = file.read_bytes()
    checkpoint.save(tmp_path / "c.pt", *run, Progress(epoch=1, best_epoch=1), best=file)
    checkpoint.save_weights(file, nn.Linear(2, 1))  # of epoch 2, whose checkpoint a crash took
    assert file.read_bytes() != known
    assert checkpoint.restore(tmp_path / "c.pt", *run, best=file).best_epoch == 1
    assert file.read_bytes() == known


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_checkpoint_can_not_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"version": 3, "model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="can not be read"):
        checkpoint.restore(tmp_path / "c.pt", *parts(), best=tmp_path / "best")
    assert capsys.readouterr().out == ""


def test_best_weights_are_those_of_the_plain_model(tmp_path: Path):
    model, *_ = parts()
    checkpoint.save_weights(tmp_path / "best.safetensors", model)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    saved = load_file(tmp_path / "best.safetensors")
    assert set(saved) == set(plain.state_dict())
    checkpoint.load_weights(tmp_path / "best.safetensors", plain)
    other, *_ = parts(seed=3)
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
