"""The run directory: what a run leaves on disk, enough to re-run, resume and report it.

recipe.yaml as given, resolved.yaml with every default, env.json, layers.json (the conversion report), metrics.jsonl, summary.csv
(a row an epoch), tb/ for TensorBoard, checkpoints/, best.safetensors, status.json, and once it is finished plots.png; skipped.txt
where images were skipped that can not be decoded; failure.txt where a fault of the program ended it; and .lock, which the process
that trains holds.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import torch

from fahooks.plugins import Failed, InputError
from fahooks.recipe import Recipe, Source, load, read_file, read_plain
from fahooks.report.liveness import LOCK, this_process
from fahooks.training.resolution import with_data

LOSSES = ["train_loss", "train_error", "validation_loss", "validation_error", "test_error"]
RUNS = Path("runs")
PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a run may have left that was killed before resolved.yaml, which comes last, made it one to go on with.
BARELY_BEGUN = {LOCK, *(name + end for name in ("recipe.yaml", "env.json") for end in ("", PARTIAL)), f"resolved.yaml{PARTIAL}"}
# The kinds of rows in metrics.jsonl, and what each must have.
ROWS = (("epoch", "epoch", int), ("probe", "step", int), ("test", "weights", str))
COLUMNS = ["epoch", "step", "lr", *LOSSES, "images_per_second", "seconds"]


class RunDirectory:
    """The files of one run.

    Arguments:
        path: an existing folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = path / "best.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tb"
        self.plots = path / "plots.png"
        self.failure = path / "failure.txt"
        self.skips = path / "skipped.txt"
        self.lock = path / LOCK

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        source: Source,
        *,
        out: Path | None,
        overrides: Sequence[str] = (),
        choices: Mapping[str, str] | None = None,
    ) -> RunDirectory:
        """Make a fresh one and write what is known before training.

        Arguments:
            recipe: what will run.
            source: its text as given.
            out: where; by default runs/<recipe name>-<n> with the first n that is free.
            overrides: what `--set` changed.
            choices: what was chosen where the recipe says "auto", and why, by dotted key.

        Raises:
            InputError: `out` holds something already or can not be written.
            Failed: there is no room for it.
        """
        run = cls(fresh_directory(out, recipe.name, text=source.text))
        try:
            run.write("recipe.yaml", source.text)
            run.write("env.json", _json({**_environment(source, overrides), "choices": dict(choices or {})}))
            run.write("resolved.yaml", recipe.as_yaml())
        except OSError as error:
            _refuse(error, f"{str(run.path)!r} can not be written")
        return run

    @classmethod
    def reopen(cls, path: Path) -> tuple[RunDirectory, Recipe]:
        """A run that is there, and its recipe.

        Raises:
            InputError: no run is there, or what it left is damaged.
        """
        resolved = path / "resolved.yaml"
        if not resolved.is_file():
            raise InputError(f"{str(path)!r} is no run directory: it has no resolved.yaml")
        return cls(path), load(read_file(resolved))

    @classmethod
    def newest(cls, name: str, seed: int, parent: Path = RUNS) -> RunDirectory | None:
        """The run of the recipe `name` with that seed that was begun last, of those that `create` numbers; None without one."""
        pattern = re.compile(rf"{re.escape(Path(name).name)}-(\d+)")
        numbered = {int(match[1]): path for path in (parent / name).parent.glob("*") if (match := pattern.fullmatch(path.name))}
        for _, path in sorted(numbered.items(), reverse=True):
            made_from = cls(path).made_from
            if made_from.get("name") == name and made_from.get("seed") == seed:
                return cls(path)
        return None

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with."""
        return (self.path / "resolved.yaml").is_file()

    @property
    def finished(self) -> bool:
        """Whether it needs no training any more."""
        return self.read_status().get("state") == "finished"

    @property
    def made_from(self) -> dict[str, Any]:
        """resolved.yaml as plain data, whether it still is a recipe or not; empty where there is none.

        Raises:
            InputError: it is damaged.
        """
        return read_plain(self.path / "resolved.yaml") if self.begun else {}

    def as_begun(self, asked: Recipe) -> Recipe:
        """A recipe with the loader that the run began with where it leaves the choice, which may fall otherwise by now.

        Raises:
            InputError: resolved.yaml is damaged.
        """
        data = self.made_from.get("data")
        if asked.data.loader != "auto" or not isinstance(data, dict) or "loader" not in data:
            return asked
        return with_data(asked, loader=str(data["loader"]))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training in this directory during the block.

        Raises:
            InputError: another process trains in it, or it can not be written.
        """
        with held(self.lock) as mine:
            if not mine:
                raise InputError(f"another process is training in {str(self.path)!r}: wait for it, or stop it")
            yield

    def write(self, name: str, text: str) -> None:
        """Write a file atomically."""
        write(self.path / name, lambda file: file.write(text.encode()))

    def status(self, state: str, **details: Any) -> None:
        """Record whether the run is running, in this process, finished, interrupted or failed, and what goes with it."""
        process = {"process": this_process()} if state == "running" else {}
        text = _json({"state": state, "time": _now(), **process, **details})
        try:
            self.write("status.json", text)
        except OSError:
            if not (self.path / "status.json").is_file():
                raise
            # A full disk has no room for another file, but the block that this one has can be written to.
            with (self.path / "status.json").open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

    def read_status(self) -> dict[str, Any]:
        """What `status` recorded last; empty where nothing is.

        Raises:
            InputError: it is damaged.
        """
        file = self.path / "status.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            what = "remove it, and the run goes on from its last checkpoint"
            raise InputError(f"{str(file)!r} can not be read ({' '.join(str(error).split())}): {what}") from error

    def layers(self, report: Mapping[str, Any]) -> None:
        """Write the conversion report."""
        self.write("layers.json", _json(report))

    def log(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; not-a-number becomes null, which JSON can say. `sync` brings it to the disk."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **_finite(values)}) + "\n")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind, in order."""
        return [row for row in self._rows() if row["kind"] == kind]

    @property
    def skipped(self) -> list[str]:
        """What skipped.txt says, a line an image that was skipped since it can not be decoded: its split, and what is wrong."""
        return self.skips.read_text(encoding="utf-8").splitlines() if self.skips.is_file() else []

    def skip(self, images: Iterable[str]) -> None:
        """Add images to skipped.txt that are not in it, as `skipped` has them."""
        before = self.skipped
        if not set(images) <= set(before):
            self.write(self.skips.name, "".join(f"{line}\n" for line in sorted({*before, *images})))

    def sync(self) -> None:
        """Bring what was logged to the disk, for TensorBoard too: a checkpoint that is written then counts no row that is lost.

        A power cut, unlike a kill, takes what only the system's memory has. summary.csv is on the disk whenever it is written.
        """
        for file in (self.metrics, *sorted(self.tensorboard.glob("*"))[-1:]):
            to_disk(file)

    def lost(self, epoch: int, step: int, probes_every: int | None) -> str:
        """Which rows a run should have logged that are not in metrics.jsonl, or are damaged, in words; empty where none is.

        Arguments:
            epoch: epochs that it finished.
            step: optimizer steps that it took.
            probes_every: its recipe's probes.every.
        """
        probed = step if probes_every else 0
        counted = (
            ("epochs, from epoch", range(1, epoch + 1), {row["epoch"] for row in self.rows("epoch")}),
            ("probes, from step", range(0, probed, probes_every or 1), {row["step"] for row in self.rows("probe")}),
        )
        gone = {what: [number for number in expected if number not in here] for what, expected, here in counted}
        return ", and ".join(f"{len(numbers):,} of {what} {numbers[0]:,} on" for what, numbers in gone.items() if numbers)

    def trim(self, epoch: int, step: int) -> None:
        """Forget what was logged after epoch `epoch` and from step `step` on: a resumed run writes it again.

        Files that were only half written go too.
        """
        for partial in [*self.path.glob(f"*{PARTIAL}"), *self.checkpoints.glob(f"*{PARTIAL}")]:
            partial.unlink()
        last = {"epoch": lambda row: row["epoch"] <= epoch, "probe": lambda row: row["step"] < step, "test": lambda row: False}
        kept = [row for row in self._rows() if last[row["kind"]](row)]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.summarise()

    def summarise(self) -> None:
        """Write summary.csv, a row an epoch; the test error stands in the rows of the epochs that were tested."""
        tested = {row["epoch"]: row["test_error"] for row in self.rows("test")}
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({**row, "test_error": tested.get(row["epoch"], "")} for row in self.rows("epoch"))
        self.write("summary.csv", text.getvalue())

    def _rows(self) -> list[dict[str, Any]]:
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        # What follows the last newline was cut off by a crash.
        return [row for line in lines[:-1] if (row := _row(line)) is not None]


class Following(RunDirectory):
    """The run directory as the processes see it that train with another one, rank 0, which alone writes into it.

    All that they leave is how they failed.
    """

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Rank 0 holds the directory for all."""
        yield

    def write(self, name: str, text: str) -> None:
        """Write nothing but how this process failed."""
        if name in ("status.json", self.failure.name):
            super().write(name, text)

    def status(self, state: str, **details: Any) -> None:
        """Record that the run failed; other states are rank 0's to record."""
        if state == "failed":
            super().status(state, **details)

    def log(self, kind: str, **values: Any) -> None:
        """Leave it to rank 0."""

    def trim(self, epoch: int, step: int) -> None:
        """Leave it to rank 0."""

    def summarise(self) -> None:
        """Leave it to rank 0."""


def write(path: Path, content: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically: a reader, or a crash at any moment, sees the old one or the new one.

    Arguments:
        path: the file.
        content: writes into the open file that it is given.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk it holds the room that status.json needs
        raise
    to_disk(path.parent)  # or a power cut may take the new name back


def to_disk(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the file `lock` during the block; False if another process has it, which `wait` waits for.

    It is let go when the block, or the process, ends in whatever way; the file and its folder stay.

    Raises:
        InputError: the folder can not be made, or written to.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("a")
    except OSError as error:
        raise InputError(f"{str(lock.parent)!r} is not writable: {error.strerror}") from error
    with opened as file:
        yield _locked(file, wait)


def _locked(file: IO[str], wait: bool) -> bool:
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            time.sleep(0.01)  # who looks whether it is held holds it for a moment
        else:
            return True
    return False


def fresh_directory(out: Path | None, name: str, *, text: str = "") -> Path:
    """Make the folder `out`, new or empty, or where it is None runs/<name>-<n> with the first n that is free.

    Arguments:
        out: the folder.
        name: of what will lie there.
        text: the recipe; `out` may hold what a run of it left that was killed before it had written resolved.yaml.

    Raises:
        InputError: `out` holds something already or can not be written.
        Failed: there is no room for it.
    """
    try:
        return _numbered(RUNS, name) if out is None else _claimed(out, text)
    except OSError as error:
        _refuse(error, f"the folder {str(out or Path('runs') / name)!r} can not be made")


def _refuse(error: OSError, what: str) -> NoReturn:
    """Say that there is no room, which is no fault of the input, or that it names a place which can not be used."""
    if error.errno in FULL:
        raise Failed(f"{what}: {error.strerror}; make room, then give the same command again") from error
    raise InputError(f"{what}: {error.strerror}") from error


def _numbered(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _claimed(path: Path, text: str) -> Path:
    recipe = path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {str(path)!r} is a file: name a folder that is new or empty")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise InputError(f"--out {str(path)!r} is not writable")
    if not {file.name for file in path.iterdir()} <= BARELY_BEGUN or (recipe.is_file() and recipe.read_text("utf-8") != text):
        go_on = f", or go on with `fahooks train --resume {path}`" if (path / "resolved.yaml").is_file() else ""
        raise InputError(f"--out {str(path)!r} is not empty: name a new folder{go_on}")
    return path


def _environment(source: Source, overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "time": _now(),
        "recipe": source.label,
        "overrides": list(overrides),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("fahooks", "torch", "torchvision", "timm", "numpy")},
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is damaged, as by a power cut: `lost` names those that are missed."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and any(row.get("kind") == kind and isinstance(row.get(by), of) for kind, by, of in ROWS)
    return row if known else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
