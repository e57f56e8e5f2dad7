"""Image files, damaged ones among them, read by two processes that torchrun started, beside one: the same run by every loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from fahooks.data import FfcvLoader
from fahooks.training import checkpoint

# One worker trains them all: another would train them once more.
pytestmark = pytest.mark.xdist_group("read by two processes")

HERE = Path(__file__).parent
DAMAGED = range(0, 130, 13)

RECIPE = """\
name: reading
model: {name: in_float64}
feedback: [{match: "*", rule: fa}]
data:
  dataset: imagefolder
  dataset_options: {path: images, size: 8, channels: 1, test: 0.3}
  root: ROOT
  batch_size: 9
  validation: 21
  augment: [{crop: {padding: 1}}, {flip: {}}]
  corrupt: skip
optim: {name: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 2, device: cpu, threads: 1, accumulate: 2}
"""
MISSING = FfcvLoader.available()
LOADERS = {"memory": "{}", "torchvision": "{workers: 2}", **({} if MISSING else {"ffcv": "{mode: raw, workers: 2}"})}
CASES = {name: [f"data.loader={name}", f"data.loader_options={options}"] for name, options in LOADERS.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of the runs of one process, and of two."""
    place = tmp_path_factory.mktemp("reading")
    generator = numpy.random.default_rng(0)
    for number in range(130):
        path = place / "images" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=numpy.uint8)).save(path)
        if number in DAMAGED:
            path.write_bytes(path.read_bytes()[:40])
    (place / "cases.json").write_text(json.dumps(CASES))
    for processes in (1, 2):
        folder = place / str(processes)
        folder.mkdir()
        (folder / "images").symlink_to(place / "images")
        # Each has its own root, and so its own .beton files to write.
        (folder / "r.yaml").write_text(RECIPE.replace("ROOT", str(folder)))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
        command = [sys.executable, *start, HERE / "reading.py", folder / "r.yaml", place / "cases.json", folder / "runs"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "errors").write_text(done.stderr)
    return {processes: place / str(processes) for processes in (1, 2)}


def weights(run: Path) -> dict[str, Any]:
    return checkpoint.read(max((run / "checkpoints").glob("*.pt")))["parts"]["model"]


def rows(run: Path) -> list[list[Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[value for key, value in row.items() if key.endswith(("_loss", "_error", "step"))] for row in lines]


def noted(folder: Path, loader: str, processes: int) -> list[dict[str, Any]]:
    return [json.loads((folder / "runs" / f"{loader}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("loader", LOADERS)
def test_skipped_files_leave_the_same_run_whatever_the_loader_and_the_number_of_processes(trained: dict[int, Path], loader: str):
    expected = trained[1] / "runs" / "memory"
    for folder in trained.values():
        torch.testing.assert_close(weights(folder / "runs" / loader), weights(expected), rtol=1e-10, atol=1e-12)
        assert [pytest.approx(row, rel=1e-6) for row in rows(folder / "runs" / loader)] == rows(expected)
    first, second, *_ = rows(expected)
    assert first[1] != second[1], "control: nothing was learned"


@pytest.mark.parametrize("loader", LOADERS)
def test_each_example_that_is_no_damaged_file_is_evaluated_once(trained: dict[int, Path], loader: str):
    (alone,), two = (noted(trained[processes], loader, processes) for processes in (1, 2))
    assert 0 < len(alone["evaluated"]) < alone["images"] == 39, "control: no file of the test set is damaged"
    assert sorted(two[0]["evaluated"] + two[1]["evaluated"]) == alone["evaluated"]
    assert min(len(rank["evaluated"]) for rank in two) > 10, "control: one rank evaluated them all"


@pytest.mark.skipif("ffcv" not in LOADERS, reason=MISSING or "")
def test_rank_0_alone_writes_what_ffcv_reads(trained: dict[int, Path]):
    first, second = noted(trained[2], "ffcv", 2)
    assert len(first["written"]) == 2 and second["written"] == []
    assert {path.name for path in (trained[2] / "ffcv").glob("*.beton")} == set(first["written"])
    assert (trained[2] / "errors").read_text().count("wrote imagefolder/") == 2


def test_damaged_files_are_named(trained: dict[int, Path]):
    for folder in trained.values():
        said = (folder / "errors").read_text()
        assert all(f"{number}.png" in said for number in DAMAGED)
