"""Kill a run again and again, and let it go on each time: `python killing.py FOLDER --loader NAME --kills N --seed S`.

One process imports everything once and forks: a run that nobody disturbs, and one that is killed with SIGKILL. Half of the kills
come from outside, at random times; the other half strike inside a write: before a random one of the calls that bring a file to
the disk, give it its name, or delete it, or in the middle of its content. No checkpoint is ever torn. What came out is printed
as JSON.

With the memory loader it learns scikit-learn's digits; with ffcv, JPEG files of 32x32 pixels: those of CIFAR-10 where
FAHOOKS_DATA has them, else made-up ones. The .beton files are written anew by every process that begins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fahooks.recipe import load
from fahooks.training import checkpoint, commands, run_directory
from fahooks.training.checkpoint import PassedOver
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare

RECIPE = """\
name: killed
data: DATA
model: {name: paper/mnist}
feedback: [{match: "conv*", rule: brsf}, {match: dense, rule: kp}, {match: "*", rule: fa}]
hooks: [{name: freeze_signs, after: 0.4}]
optim: {name: adam, lr: 5e-4, weight_decay: 1e-3}
schedule: {name: cosine}
train: {epochs: 6, device: cpu, threads: 1}
probes: {every: 5}
checkpoint: {every: 3, keep: 2}
"""

DATA = {
    "memory": "{dataset: digits, batch_size: 50, validation: 200, limit: 1000, augment: [{crop: {padding: 1}}]}",
    "ffcv": "{dataset: imagefolder, dataset_options: {path: images, size: 32, test: 0.1}, root: ., loader: ffcv, batch_size: 50, "
    "validation: 100, augment: [{crop: {size: 16}}, {flip: {}}]}",
}

CALLS = ("fsync", "replace", "unlink")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--loader", choices=DATA, default="memory")
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    os.chdir(given.folder)
    Path("killed.yaml").write_text(RECIPE.replace("DATA", DATA[given.loader]))
    if given.loader == "ffcv":
        add_images(Path("images"), each=40)
    prepare(load("killed.yaml"))  # imports what the processes would each import again
    begun = time.perf_counter()
    assert ended(start(Path("whole"))) == 0
    seconds = time.perf_counter() - begun
    kills = killed_again_and_again(given.kills, random.Random(given.seed), seconds)
    whole, runs = RunDirectory(Path("whole")), [RunDirectory(path) for path in sorted(Path().glob("cut-*"))]
    same = {
        what: all(told(run) == told(whole) for run in runs)
        for what, told in (
            ("weights", weights), ("best weights", best), ("metrics.jsonl", rows), ("summary.csv", summary),
            ("TensorBoard", curves), ("files", names),
        )
    }  # fmt: skip
    print(json.dumps({
        "loader": given.loader, "kills": len(kills), "inside a write": sum(kill.inside for kill in kills),
        "steps saved at each": [kill.step for kill in kills], "runs": len(runs), "the same as undisturbed": same,
    }))  # fmt: skip


def add_images(folder: Path, each: int) -> None:
    """Put so many images of each of ten classes into `folder`."""
    real = Path(os.environ.get("FAHOOKS_DATA", "")).expanduser() / "cifar10-jpeg" / "train"
    generator = numpy.random.default_rng(0)
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
        found = sorted(real.glob("*"))[number : number + 1] if real.is_dir() else []
        files = sorted(path for path in found for path in path.iterdir())[:each]
        for place in range(each):
            to = folder / str(number) / f"{place}.jpg"
            if files:
                shutil.copyfile(files[place], to)
            else:
                coarse = generator.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(to)


@dataclass
class Kill:
    step: int
    inside: bool


def killed_again_and_again(kills: int, draw: random.Random, seconds: float) -> list[Kill]:
    """Kill a run so many times, then let it end. Where it ended before, after `seconds` undisturbed, another one is begun."""
    struck: list[Kill] = []
    runs = 1
    while len(struck) < kills:
        run = RunDirectory(Path(f"cut-{runs}"))
        from_within = len(struck) % 2 == 1
        process = start(run.path, dies_at=draw.randrange(60) if from_within else None)
        if not from_within:
            time.sleep(draw.uniform(0.0, seconds / 4))
            os.kill(process, signal.SIGKILL)
        code = ended(process)
        if code == -signal.SIGKILL:
            step = max((int(path.stem.removeprefix("step-")) for path in run.checkpoints.glob("step-*.pt")), default=0)
            struck.append(Kill(step, from_within or any(run.path.rglob("*.partial"))))
        else:
            assert code == 0
        runs += run.finished
    assert ended(start(Path(f"cut-{runs}"))) == 0
    return struck


def start(folder: Path, dies_at: int | None = None) -> int:
    """Fork a process that begins or continues the run in `folder`; it kills itself before the call of that number."""
    shutil.rmtree("ffcv", ignore_errors=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("error", PassedOver)
        torch.set_num_threads(1)  # makes torch's pool anew, which is lost by a fork, and which two threads at once get wrong
        if dies_at is not None:
            (die_in_the_middle if dies_at % 2 else die_inside_a_write)(dies_at)
        commands.resume_newest("killed.yaml", out=folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def die_inside_a_write(number: int) -> None:
    left = [number]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def die_in_the_middle(number: int) -> None:
    """Die when half of a piece of a file is written, of which a checkpoint has many."""
    left = [10 * number]
    real = run_directory.write

    class Deadly:
        def __init__(self, file: BinaryIO) -> None:
            self.file = file

        def write(self, piece: Any) -> int:
            if left[0] == 0:
                self.file.write(bytes(piece)[: len(piece) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return self.file.write(piece)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def write(path: Path, content: Callable[[Any], object]) -> None:
        real(path, lambda file: content(Deadly(file)))

    run_directory.write = checkpoint.write = write


def ended(process: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def weights(run: RunDirectory) -> dict[str, bytes]:
    newest = max(run.checkpoints.iterdir())
    model = torch.load(newest, weights_only=True)["parts"]["model"]
    return {name: value.numpy().tobytes() for name, value in model.items()}


def best(run: RunDirectory) -> bytes:
    return run.best.read_bytes()


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    """metrics.jsonl, without times."""
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in lines]


def summary(run: RunDirectory) -> list[list[str]]:
    """summary.csv, without its last two columns, which are times."""
    return [line.split(",")[:-2] for line in (run.path / "summary.csv").read_text().splitlines()]


def curves(run: RunDirectory) -> dict[str, list[tuple[int, float | str]]]:
    """What TensorBoard draws, without times."""
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("seconds", "images_per_second")]
    return {tag: [(event.step, repr(event.value)) for event in events.Scalars(tag)] for tag in tags}


def names(run: RunDirectory) -> set[str]:
    return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.parent != run.tensorboard}


if __name__ == "__main__":
    main()
