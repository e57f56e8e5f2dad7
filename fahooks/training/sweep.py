"""Sweeps: one recipe with several settings and seeds, a run each, compared by mean and spread."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fahooks.plugins import InputError
from fahooks.recipe import find, load
from fahooks.recipe.reading import Reader
from fahooks.recipe.tree import Tree, shown
from fahooks.training.run_directory import RUNS
from fahooks.training.series import Wanted, carry_out, goes_on_by_itself

MAX_RUNS = 1_000


@dataclass(frozen=True)
class Sweep:
    """The runs of one recipe with every combination of some settings, each with every seed.

    Attributes:
        out: the folder that they lie in.
        settings: "dotted.key=value" each, a tuple a combination; one empty tuple where nothing but the seed is changed.
        runs: all of them, seed by seed.
    """

    out: Path
    settings: list[tuple[str, ...]]
    runs: list[Wanted]

    def paths(self, settings: tuple[str, ...]) -> list[Path]:
        """The run directories of one combination that are there, a seed each."""
        return [run.path for run in self.runs if run.path.parent == _folder(self.out, settings) and run.run.metrics.is_file()]


def plan(
    name: str,
    overrides: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    out: Path | None = None,
) -> Sweep:
    """Lay a sweep out; nothing is trained or written.

    Arguments:
        name: a shipped recipe or a file.
        overrides: "dotted.key=value" each, for all runs.
        sweeps: "dotted.key=value,value" each; the runs are the product of all.
        seeds: a run each; by default the one of the recipe.
        out: the folder for the run directories; by default runs/<recipe name>-sweep.

    Raises:
        InputError: the recipe, with any of the settings, is not right, or two settings make the same recipe of it.
    """
    source = find(name)
    if seeds is not None and any(override.partition("=")[0] == "seed" for override in overrides):
        raise InputError("--seeds says which seeds there are: leave --set seed away")
    swept = {sweep.partition("=")[0] for sweep in sweeps}
    for override in overrides:
        if (key := override.partition("=")[0]) in swept:
            raise InputError(f"--sweep says which values {key} takes: leave --set {key} away")
    settings = list(itertools.islice(itertools.product(*map(_values, sweeps)), MAX_RUNS + 1))
    seeds = seeds if seeds is not None else [load(source, overrides).seed]
    if len(settings) * len(seeds) > MAX_RUNS:
        raise InputError(f"a sweep of more than {MAX_RUNS:,} runs: sweep over fewer values")
    out = out or RUNS / f"{load(source, overrides).name}-sweep"
    if (out / "resolved.yaml").is_file():
        raise InputError(f"--out {str(out)!r} is the directory of one run: name another folder for a series")
    runs: list[Wanted] = []
    for seed in seeds:
        for setting in settings:
            recipe = load(source, (*overrides, f"seed={seed}"), setting)
            changed = (*overrides, *setting, f"seed={seed}")
            runs.append(Wanted(_folder(out, setting) / f"seed-{seed}", recipe, source, changed, ", ".join(setting)))
    _check_different(runs[: len(settings)])
    return Sweep(out, settings, runs)


def train_missing(sweep: Sweep) -> list[str]:
    """Train what is missing of a sweep; a line for each run whose loss diverged.

    Raises:
        InputError: data are not right, or what is in its folder was made from other recipes.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    with goes_on_by_itself():
        return carry_out(sweep.runs, sweep.out)


def _check_different(runs: Sequence[Wanted]) -> None:
    """Refuse to train one recipe twice, with one seed."""
    made: dict[str, str] = {}
    for run in runs:
        recipe = run.recipe.as_yaml()
        if recipe in made:
            raise InputError(f"--sweep trains the same twice: {made[recipe]} and {run.setting} are one recipe")
        made[recipe] = run.setting


def _values(sweep: str) -> list[str]:
    """The settings "key=value" that "key=value,value" stands for, as they were written."""
    key, _, text = sweep.partition("=")
    if not all(key.split(".")) or not text.strip():
        raise InputError(f"--sweep must be dotted.key=value,value, such as optim.lr=1e-3,1e-4 (got {shown(sweep)})")
    if key.split(".")[0] in ("seed", "name", "base"):
        raise InputError(f"--sweep can not change {key}" + ("; --seeds does" if key == "seed" else ""))
    read = Tree()
    values = Reader(read, None, f"--sweep {key}").read(f"[{text}]")
    if read.problems or not isinstance(values, list):
        raise InputError("\n".join(read.problems) or f"--sweep {key}: no values (got {shown(text)})")
    texts = [part.strip() for part in text.split(",")]
    if len(texts) != len(values):  # commas within values
        texts = [yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip() for value in values]
    return [f"{key}={text}" for text in texts]


def _folder(out: Path, settings: tuple[str, ...]) -> Path:
    """Where the runs of a combination lie: a folder named after it, in characters that every file system has."""
    name = ",".join(settings)
    plain = re.sub(r"[^\w.=,+-]", "_", name)[:100]
    digest = "" if plain == name else f"-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return out / f"{plain}{digest}"
