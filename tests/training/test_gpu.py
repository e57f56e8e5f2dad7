"""Runs on a GPU: what a GPU does otherwise than a CPU. Skipped where torch finds none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fahooks.data.ffcv import library
from fahooks.plugins import Failed
from fahooks.recipe import Recipe
from fahooks.training import checkpoint, commands, loop, loop_benchmark
from fahooks.training.dry_run import dry_run
from fahooks.training.evaluation import evaluate_run
from fahooks.training.loop import Result
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare
from fahooks.training.step import take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")

Run = Callable[..., tuple[RunDirectory, Result]]
Tiny = Callable[..., Recipe]

HERE = Path(__file__).parent
GPU = "train.device=cuda"

FLOAT64 = (HERE / "float64.yaml").read_text()


def weights(run: RunDirectory | Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    folder = run if isinstance(run, Path) else run.path
    return checkpoint.read(max((folder / "checkpoints").glob("*.pt")))["parts"]["model"]


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name].cpu(), value.cpu(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=fp32"],
        ["train.precision=tf32"],
        ["train.precision=bf16"],
        ["train.precision=fp16"],
        ["train.precision=fp16", "train.accumulate=2", "train.clip_norm=1", "train.ema=0.9", "train.label_smoothing=0.1"],
        ["train.precision=bf16", "train.channels_last=true"],
        ["train.precision=bf16", "train.compile=true"],
        ["train.precision=fp16", "feedback=[{rule: drtp}]", "optim.lr=5e-5"],
        ["train.precision=fp16", "feedback=[{rule: kp}]", "hooks=[{name: constant_norm}]"],
        ["optim={name: sgd, lr: 0.01, momentum: 0.9}", "train.precision=fp16", "feedback=[{rule: usf_sn}]"],
    ],
    ids=" ".join,
)
def test_every_way_to_compute_learns(run: Run, options: list[str]):
    directory, _ = run("r", GPU, "train.epochs=4", "data.limit=1200", *options)
    assert directory.finished
    losses = [row["train_loss"] for row in directory.rows("epoch")]
    assert losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in weights(directory).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("rule", ["fa", "usf_sn", "dfa", "kp"])
def test_a_run_in_float64_ends_with_the_weights_of_one_on_the_cpu(rule: str, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(FLOAT64)
    options = [f"feedback=[{{rule: {rule}}}]", "train.clip_norm=0.5", "train.accumulate=2"]
    cases = {"cpu": options, "cuda": [*options, GPU]}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, HERE / "in_float64.py", tmp_path / "r.yaml", tmp_path / "cases.json", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(weights(tmp_path / "cuda"), weights(tmp_path / "cpu"), 1e-8)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_one_process_of_torchrun_by_nccl_ends_with_the_weights_of_one_alone(way: str, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(FLOAT64)
    for name, options in (("alone", [GPU]), (way, [GPU, f"train.distributed={way}"])):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: options}))
        start = [sys.executable] if name == "alone" else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*start, HERE / "in_float64.py", tmp_path / "r.yaml", tmp_path / f"{name}.json", tmp_path]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_close(weights(tmp_path / way), weights(tmp_path / "alone"), 1e-9)


def test_more_processes_than_gpus_are_refused(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(FLOAT64.replace("in_float64", "paper/mnist").replace("device: cpu, ", ""))
    count = torch.cuda.device_count() + 1
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*start, "-m", "fahooks", "train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert f"torchrun started {count} processes here, and there " in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_goes_on_from_its_checkpoint(run: Run, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    sgd = "optim={name: sgd, lr: 0.01, momentum: 0.9}"  # Adam makes a whole step of the rounding of a gradient that is zero
    options = (GPU, f"train.precision={precision}", "train.ema=0.9", "checkpoint.every=3", "feedback=[{rule: usf_sn}]", sgd)
    whole, _ = run("whole", *options)
    steps = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return take_step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut", *options)
    commands.resume(tmp_path / "cut")
    assert_close(weights(tmp_path / "cut"), weights(whole), 1e-5)


def test_a_run_is_evaluated_on_the_cpu(run: Run):
    directory, result = run("r", GPU)
    there, here = evaluate_run(directory.path), evaluate_run(directory.path, overrides=["train.device=cpu"])
    assert here.test["error"] == there.test["error"] == pytest.approx(result.test_error)


AUGMENTED = "data.augment=[{crop: {padding: 2}}, {flip: {}}, {cutout: {size: 3}}]"


@pytest.mark.parametrize("loader", ["memory", "torchvision", "ffcv"])
def test_loaders_give_a_gpu_the_images_that_they_give_a_cpu(loader: str, tiny: Tiny, tmp_path: Path):
    if loader == "ffcv" and (missing := library.missing()):
        pytest.skip(missing)
    options = [AUGMENTED, f"data.loader={loader}", f"data.root={tmp_path}"]
    here, there = (prepare(tiny(*options, device)).train for device in ("train.device=cpu", GPU))
    for epoch in (1, 2):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        count = 0
        for ours, theirs in zip(there, here, strict=True):
            assert ours.images.is_cuda and ours.labels.is_cuda and ours.valid.is_cuda
            torch.testing.assert_close(ours.images.cpu(), theirs.images, rtol=1e-6, atol=1e-6)
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert ours.index.tolist() == theirs.index.tolist()
            count += ours.count
        assert count == here.images


def test_memory_that_a_gpu_does_not_have_is_a_clear_failure(run: Run):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**28 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(Failed, match="out of memory"):
            run("r", GPU, "model.name=timm/resnet50", "data.limit=1000", "data.batch_size=900")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_dry_run_says_what_the_gpu_does():
    lines = dict(dry_run("quickstart", (GPU, "data.limit=120", "data.batch_size=40")).lines())
    assert torch.cuda.get_device_name() in lines["speed"]
    assert "of the GPU" in lines["memory"]


def test_the_loop_is_timed_on_a_gpu(tiny: Tiny):
    speeds = loop_benchmark.compare(tiny(GPU), rounds=2)
    assert all(min(speed.images.values()) > 0 for speed in speeds)


def test_steps_are_timed_on_a_gpu(tmp_path: Path):
    command = ["bench", "step", "timm/test_resnet", "--image", "64", "--batch", "8", "--rounds", "2", "--rules", "fa,usf_sn,dfa"]
    more = ["--device", "cuda", "--bf16", "--channels-last", "--json", str(tmp_path / "t.json")]
    done = subprocess.run([sys.executable, "-m", "fahooks", *command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name() in done.stdout and "device ms" in done.stdout
