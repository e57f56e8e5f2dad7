from __future__ import annotations

import csv
import json
import math
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch._inductor.exc import InductorError

from fahooks import models
from fahooks.data import Batch, Stream
from fahooks.plugins import Failed, InputError
from fahooks.recipe import Recipe
from fahooks.surgery import convert
from fahooks.training import checkpoint, loop
from fahooks.training.checkpoint import Checkpoints
from fahooks.training.loop import Diverged, Result, train
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare
from fahooks.training.step import Outcome, known
from fahooks.training.stopping import Stop

from .conftest import SOURCE

Run = Callable[..., tuple[RunDirectory, Result]]
Tiny = Callable[..., Recipe]


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    (newest,) = run.checkpoints.iterdir()
    return torch.load(newest, weights_only=True)["parts"]["model"]


def same(a: RunDirectory, b: RunDirectory) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run: Run):
    first, result = run("a")
    torch.manual_seed(77)
    again, result_again = run("b")
    other, _ = run("c", "seed=1")
    assert same(first, again)
    assert not same(first, other)
    assert first.best.read_bytes() == again.best.read_bytes()
    assert result.test_error == result_again.test_error
    assert without_times(first.rows("epoch")) == without_times(again.rows("epoch"))


def test_sums_have_the_same_bits_wherever_the_run_looks_at_them(run: Run):
    seldom, _ = run("a", "data.limit=1500")
    often, _ = run("b", "data.limit=1500", "checkpoint.every=7")
    assert without_times(often.rows("epoch")) == without_times(seldom.rows("epoch"))


def test_the_loop_takes_the_steps_of_a_loop_written_by_hand(tiny: Tiny, run: Run):
    directory, _ = run("a")
    recipe = tiny()
    setup = prepare(recipe)
    torch.manual_seed(recipe.seed)
    model = models.build("paper/mnist", image_size=8)
    convert(model, "fa", seed=recipe.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
    for epoch in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = 5e-4 if epoch < 3 else 5e-4 * 0.1
        setup.train.set_epoch(epoch)
        for batch in setup.train:
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in weights(directory).items())


def test_probes_do_not_change_the_training(run: Run):
    probed, _ = run("a")
    plain, _ = run("b", "probes.every=null")
    assert same(probed, plain)
    assert [row["step"] for row in probed.rows("probe")] == [0, 4, 8, 12]
    assert plain.rows("probe") == []


# Of 15 steps, 5 an epoch: signs freeze in the second epoch.
HOOKS = "hooks=[{name: freeze_signs, after: 0.5}, {name: alignment, match: dense}]"
DROPOUT = "model={name: timm/resnet18, drop_rate: 0.5}"


def stop_at(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Ask the run to stop at the last one of so many batches, those of evaluations among them."""
    real, left = Stream.__iter__, [batches]

    def counted(self: Stream):
        for batch in real(self):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Stream, "__iter__", counted)


@pytest.mark.parametrize(
    ("batches", "overrides"),
    [
        # Of each epoch, five batches are trained on, and then one is validated on; at the end one is tested on.
        *((batches, []) for batches in (1, 3, 5, 6, 7, 13, 17, 18, 19)),
        (3, [HOOKS]),
        (10, [HOOKS]),
        (9, ["feedback=[{rule: kp}]"]),
        (8, ["train.ema=0.9", "schedule={name: cosine, warmup: 1.5}", "train.accumulate=3"]),
        (7, ["train.precision=fp16"]),
        (9, ["feedback=[{rule: wm}]"]),
        (9, ["feedback=[{rule: brsf}]"]),
        (9, [DROPOUT, "probes.every=null", "data.limit=110", "data.batch_size=10"]),
    ],
)
def test_a_stopped_run_that_is_resumed_ends_with_the_same_bits(
    batches: int, overrides: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, whole_result = run("whole", *overrides)
    stop_at(monkeypatch, batches + 1)  # the first one was tried out
    with pytest.raises(KeyboardInterrupt, match="go on with `fahooks train --resume"):
        run("cut", *overrides)
    monkeypatch.undo()
    path = tmp_path / "cut"
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["resume"]) == ("interrupted", f"fahooks train --resume {path}")
    torch.manual_seed(123)
    cut, recipe = RunDirectory.reopen(path)
    result = train(prepare(recipe), cut, resume=True)
    assert same(whole, cut)
    assert whole.best.read_bytes() == cut.best.read_bytes()
    assert (result.test_error, result.best_epoch) == (whole_result.test_error, whole_result.best_epoch)
    for kind in ("epoch", "probe", "test"):
        assert without_times(whole.rows(kind)) == without_times(cut.rows(kind))
    assert curves(whole) == curves(cut)


def test_a_run_that_was_killed_between_its_last_checkpoint_and_the_end_keeps_no_more_than_it_should(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Checkpoints, "prune", lambda self, newest: None)
    run("cut", "checkpoint.keep=2")
    monkeypatch.undo()
    path = tmp_path / "cut"
    assert len(list((path / "checkpoints").iterdir())) > 2, "control: nothing is too old"
    (path / "status.json").unlink()
    cut, recipe = RunDirectory.reopen(path)
    train(prepare(recipe), cut, resume=True)
    assert len(list((path / "checkpoints").iterdir())) == 2


def curves(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard draws, without times."""
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("seconds", "images_per_second")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


class Disk:
    """What a power cut leaves: the content that files had, and the names that folders had, when they were brought to the disk."""

    def __init__(self) -> None:
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.real = os.fsync

    def fsync(self, descriptor: int) -> None:
        self.real(descriptor)
        about, path = os.fstat(descriptor), Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(about.st_mode):
            self.names[about.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.contents[about.st_ino] = path.read_bytes()

    def leave(self, folder: int, to: Path) -> None:
        """Put what is left of a folder, which is known by its number, into another one."""
        to.mkdir()
        for name, number in self.names[folder].items():
            if number in self.names:
                self.leave(number, to / name)
            else:
                (to / name).write_bytes(self.contents.get(number, b""))


@pytest.mark.skipif(sys.platform != "linux", reason="files that are open are read from /proc")
def test_a_power_cut_after_a_checkpoint_takes_nothing_that_it_counts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Names too are lost that were not brought to the disk. TensorBoard's thread is slow, so that it may well be behind."""
    disk, left = Disk(), []
    save, record = Checkpoints.save, RecordWriter.write

    def saved(self: Checkpoints, *arguments: Any) -> Path:
        path = save(self, *arguments)
        left.append(tmp_path / f"left-{len(left)}")
        disk.leave(self.folder.parent.stat().st_ino, left[-1])
        return path

    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(Checkpoints, "save", saved)
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: time.sleep(0.01) or record(self, data))
    whole, _ = run("whole", "checkpoint.every=2")
    monkeypatch.undo()
    assert len(left) == 1 + 6 + 3, "control: a checkpoint at the beginning, at every second step, and after every epoch"
    for path in (left[1], left[3], left[8]):  # inside the first epoch, after it, and inside the last one
        cut, recipe = RunDirectory.reopen(path)
        assert any(cut.checkpoints.iterdir())
        train(prepare(recipe), cut, resume=True)
        assert same(whole, cut)
        for kind in ("epoch", "probe", "test"):
            assert without_times(whole.rows(kind)) == without_times(cut.rows(kind))
        assert curves(whole) == curves(cut)
    assert "lost rows" not in capsys.readouterr().out


def test_a_run_that_goes_on_says_which_rows_it_counts_and_has_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stop_at(monkeypatch, 15)  # in the third epoch
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.undo()
    cut, recipe = RunDirectory.reopen(tmp_path / "cut")
    lines = cut.metrics.read_text().splitlines(keepends=True)
    cut.metrics.write_text("".join(line for line in lines if '"epoch": 1' in line) + "\0\0\0\n")
    train(prepare(recipe), cut, resume=True)
    line = f"{cut.metrics} has lost rows (1 of epochs, from epoch 2 on, and 1 of probes, from step 8 on), as to a power cut: "
    assert f"{line}curves have a gap there\n" in capsys.readouterr().out
    assert [row["epoch"] for row in cut.rows("epoch")] == [1, 3]
    assert cut.finished


def test_a_stop_is_heeded_after_the_step_and_a_second_one_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3, which is saved"):
        run("a")
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize(
    ("stopped", "raised", "message", "state"),
    [
        (True, KeyboardInterrupt, "stopped in a step; go on with `fahooks train --resume", "interrupted"),
        (False, Failed, "g[+][+] was killed.* this is a fault", "failed"),
    ],
)
def test_a_compiler_that_the_stop_ended_too_is_no_fault(
    stopped: bool, raised: type, message: str, state: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def compiles(*_: Any) -> None:
        if stopped:
            signal.raise_signal(signal.SIGINT)
        raise InductorError(RuntimeError("g++ was killed"), None)

    monkeypatch.setattr(loop, "take_step", compiles)
    with pytest.raises(raised, match=message):
        run("a")
    assert RunDirectory(tmp_path / "a").read_status()["state"] == state


def test_weights_and_running_statistics_have_to_be_finite_and_masks_have_not():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net.register_buffer("mask", torch.full((3,), -math.inf))
    assert loop._finite(net)
    for tensor in (net.get_buffer("1.running_var"), net.get_parameter("0.weight").data):
        before = tensor.clone()
        tensor.view(-1)[0] = math.nan
        assert not loop._finite(net)
        tensor.copy_(before)


def test_no_error_is_told_where_the_loss_is_not_finite(tiny: Tiny):
    setup = prepare(tiny())
    with torch.no_grad():
        setup.evaluated.get_parameter("conv1.weight").fill_(math.inf)
    with pytest.raises(Diverged, match="the test loss was nan, in evaluation mode"):
        loop.evaluate(setup, setup.test, "test")
    assert math.isnan(loop.measure(setup, setup.test, "test")["loss"]), "control"


def test_epochs_after_the_last_step_are_not_gone_through(run: Run):
    held, _ = run("a", "train.epochs=1000000000000", "train.max_steps=2")
    assert held.read_status()["state"] == "finished"


def test_hooks_act_on_the_run(run: Run, tiny: Tiny):
    held, _ = run("held", "hooks=[{name: constant_norm}]", "probes.every=null")
    plain, _ = run("plain", "probes.every=null")
    start = prepare(tiny()).model.get_parameter("dense.weight").double().norm().item()
    assert weights(held)["dense.weight"].double().norm().item() == pytest.approx(start, rel=1e-6)
    assert weights(plain)["dense.weight"].double().norm().item() != pytest.approx(start, rel=1e-4), "control"


def test_the_best_epoch_is_the_one_with_the_lowest_validation_error(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Validation says epoch 2 (and 4, which ties and comes later); the test set would have said epoch 3."""
    errors = {"validation": iter([50.0, 20.0, 30.0, 20.0]), "test": iter([7.0, 9.0])}
    asked: list[str] = []
    norms: list[float] = []

    def pretend(setup: Any, loader: Any, name: str, stop: Any) -> dict[str, float]:
        asked.append(name)
        norms.append(setup.model.get_parameter("dense.weight").norm().item())
        return {f"{name}_loss": 1.0, f"{name}_error": next(errors[name])}

    monkeypatch.setattr(loop, "evaluate", pretend)
    setup = prepare(tiny("train.epochs=4"))
    run = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path)
    result = train(setup, run)
    assert asked == ["validation"] * 4 + ["test"] * 2
    assert (result.best_epoch, result.validation_error, result.final_test_error, result.test_error) == (2, 20.0, 7.0, 9.0)
    # The last evaluation saw the weights of epoch 2, the one before it those of epoch 4.
    assert norms[5] == norms[1] != norms[3] == norms[4]
    assert load_file(run.best)["dense.weight"].norm().item() == norms[1]


def test_a_run_directory_has_all_that_it_should(run: Run, tiny: Tiny):
    directory, result = run("a")
    assert {p.name for p in directory.path.iterdir()} == {
        "recipe.yaml", "resolved.yaml", "env.json", "layers.json", "metrics.jsonl", "summary.csv",
        "checkpoints", "best.safetensors", "status.json", "tb", "plots.png",
    }  # fmt: skip
    assert yaml.safe_load((directory.path / "resolved.yaml").read_text())["data"]["loader"] == "memory"
    layers = json.loads((directory.path / "layers.json").read_text())["layers"]
    assert [(layer["name"], layer["rule"]) for layer in layers] == [(n, "fa") for n in ("conv1", "conv2", "dense", "output")]
    status = json.loads((directory.path / "status.json").read_text())
    assert (status["state"], status["result"]["test_error"]) == ("finished", result.test_error)
    epochs = directory.rows("epoch")
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert [row["lr"] for row in epochs] == pytest.approx([5e-4, 5e-4, 5e-5])
    assert result.validation_error == min(row["validation_error"] for row in epochs)
    summary = list(csv.DictReader((directory.path / "summary.csv").read_text().splitlines()))
    assert float(summary[2]["test_error"]) == result.final_test_error
    assert float(summary[result.best_epoch - 1]["test_error"]) == result.test_error
    assert set(load_file(directory.best)) == set(models.build("paper/mnist", image_size=8).state_dict())


def test_tensorboard_gets_the_curves(run: Run):
    directory, _ = run("a")
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    assert {"train_loss", "validation_error", "lr", "test_error", "angle/conv1", "norm_ratio/dense"} <= set(
        events.Tags()["scalars"]
    )
    logged = [row["validation_error"] for row in directory.rows("epoch")]
    assert [event.value for event in events.Scalars("validation_error")] == pytest.approx(logged)


def test_the_reported_test_error_is_that_of_the_saved_weights(run: Run, tiny: Tiny):
    directory, result = run("a")
    setup = prepare(tiny())
    plain = models.build("paper/mnist", image_size=8).eval()
    checkpoint.load_weights(directory.best, plain)
    with torch.no_grad():
        wrong = sum(int((plain(b.images).argmax(1) != b.labels).sum()) for b in setup.test)
    assert result.test_error == pytest.approx(100 * wrong / 360)


def test_the_best_weights_load_into_the_plain_timm_model(run: Run):
    directory, _ = run("a", "model={name: timm/resnet18}", "train.epochs=1", "data.limit=124", "probes.every=null")
    plain = timm.create_model("resnet18", num_classes=10, in_chans=1)
    plain.load_state_dict(load_file(directory.best), strict=True)
    trained = torch.load(next(directory.checkpoints.iterdir()), weights_only=True)["parts"]["model"]
    assert all(torch.equal(value, trained[key]) for key, value in plain.state_dict().items())
    assert len(trained) > len(plain.state_dict()), "control: the trained model had feedback matrices"


def test_it_learns(run: Run):
    directory, result = run("a", "feedback=[{rule: usf_sn}]", "data.limit=800", "train.epochs=8", "schedule={name: constant}")
    losses = [row["train_loss"] for row in directory.rows("epoch")]
    assert losses[-1] < 0.5 * losses[0]
    assert result.test_error < 20


def test_an_error_in_the_middle_is_recorded(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def breaks(*args: Any) -> dict[str, Any]:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(loop, "evaluate", breaks)
    with pytest.raises(Failed, match="RuntimeError: disk on fire; this is a fault of fahooks or a plugin") as caught:
        train(prepare(tiny()), RunDirectory(tmp_path))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", str(caught.value))
    assert "in breaks" in (tmp_path / "failure.txt").read_text()


def test_evaluation_is_in_evaluation_mode_and_counts_every_image(tiny: Tiny):
    setup = prepare(tiny())
    setup.model.train()
    first, second = (loop.evaluate(setup, setup.test, "test") for _ in range(2))
    assert first == second
    setup.model.eval()
    with torch.no_grad():
        logits = torch.cat([setup.model(b.images) for b in setup.test])
    labels = setup.test.labels
    assert first["test_error"] == pytest.approx(100 * (logits.argmax(1) != labels).float().mean().item())
    assert first["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_skipped_image_counts_neither_as_right_nor_as_wrong(tiny: Tiny):
    setup = prepare(tiny())
    batch = next(iter(setup.test))
    wrong = setup.model.eval()(batch.images).argmax(1) != batch.labels
    assert 0 < wrong.sum() < len(wrong)
    found = loop.evaluate(setup, [replace(batch, valid=wrong)], "test")
    assert found["test_error"] == 100
    expected = F.cross_entropy(setup.model(batch.images)[wrong], batch.labels[wrong])
    assert found["test_loss"] == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(InputError, match="no image of the test split can be decoded"):
        loop.evaluate(setup, [replace(batch, valid=torch.zeros_like(wrong))], "test")


def test_skipped_images_are_left_out_of_the_training_error(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def half(stream: Stream, *args: Any, original: Any = Stream._batch) -> Batch:
        batch = original(stream, *args)
        return replace(batch, valid=torch.arange(len(batch.labels)) % 2 == 0)

    monkeypatch.setattr(Stream, "_batch", half)
    wrong = lambda _, batch: [Outcome(2.0 * batch.valid.sum(), batch.labels + 1, known(batch))]  # noqa: E731
    monkeypatch.setattr(loop, "take_step", wrong)
    setup = prepare(tiny("train.epochs=1", "probes.every=null"))
    directory = RunDirectory.create(setup.recipe, SOURCE, out=tmp_path / "half")
    train(setup, directory)
    (row,) = directory.rows("epoch")
    assert (row["train_loss"], row["train_error"]) == (2, 100)


def test_bf16_and_channels_last_train(run: Run):
    directory, result = run("a", "train.precision=bf16", "train.channels_last=true", "train.epochs=1")
    assert math.isfinite(directory.rows("epoch")[0]["train_loss"])
    assert all(value.dtype == torch.float32 for value in load_file(directory.best).values())


def test_progress_goes_to_standard_output_as_a_line_an_epoch(run: Run, capsys: pytest.CaptureFixture[str]):
    run("a")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("loss" in line and "validation error" in line and "images/s" in line for line in lines)


def test_real_mnist_trains(data_root: Path, run: Run):
    directory, result = run(
        "a", "data={dataset: mnist, batch_size: 50, validation: 500, limit: 1500}", f"data.root={data_root}",
        "feedback=[{rule: usf_sn}]", "train.epochs=1",
    )  # fmt: skip
    assert result.test_error < 50
    assert weights(directory)["dense.weight"].shape == (1024, 3136)
