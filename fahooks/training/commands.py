"""Starting, resuming and comparing runs from what a user typed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from fahooks.plugins import InputError, datasets, rules
from fahooks.recipe import Recipe, Source, find
from fahooks.training import distributed
from fahooks.training.distributed import told
from fahooks.training.failures import recorded
from fahooks.training.fitting import load_fitting
from fahooks.training.loop import Result, train
from fahooks.training.resolution import resolve
from fahooks.training.run_directory import Following, RunDirectory, fresh_directory
from fahooks.training.sameness import check_same
from fahooks.training.setup import Setup, prepare
from fahooks.training.streams import SharedStreams, load_dataset, open_streams

QUICKSTART_RULES = ("bp", "fa", "usf_sn")


def start(name: str, overrides: Sequence[str] = (), out: Path | None = None) -> str:
    """Train the recipe called `name`, with `overrides`, in a fresh run directory, and return the final line.

    Whatever can be wrong before the first step is found before anything is written.

    Arguments:
        name: a shipped recipe or a file.
        overrides: "dotted.key=value" each.
        out: the run directory; by default runs/<recipe name>-<n>.

    Raises:
        InputError: recipe, data or directory are not right, or the loss diverged.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    before = distributed.started_again()
    if before is not None:
        return resume(before)
    source = find(name)
    setup = prepare(load_fitting(source, overrides))
    run = run_at(
        told(lambda: RunDirectory.create(setup.recipe, source, out=out, overrides=overrides, choices=setup.choices).path)
    )
    distributed.remember(run.path)
    with run.alone():
        return final_line(setup.recipe, train(setup, run), run)


def resume(path: Path) -> str:
    """Go on with the run in `path` after the last step that it has a checkpoint of, and return the final line.

    A run that is finished is left as it is.

    Raises:
        InputError: there is no run to go on with, or another process is at it.
        Failed: something else went wrong; the message says what.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    run, recipe = type(run_at(path)).reopen(path)
    if run.finished:
        return _finished_line(recipe, run)
    distributed.remember(run.path)
    with run.alone():
        with recorded(run):
            setup = prepare(recipe)
        return final_line(recipe, train(setup, run, resume=True), run)


def resume_newest(name: str, overrides: Sequence[str] = (), out: Path | None = None) -> str:
    """Go on with the newest run of a recipe and its seed, begin it where there is none, and return the final line.

    Run again and again, as by a cluster that restarts what died, it ends with one finished run.

    Arguments:
        name: a shipped recipe or a file.
        overrides: "dotted.key=value" each.
        out: the run directory; by default the one of runs/<recipe name>-<n> with the highest n that has the same seed.

    Raises:
        InputError: as `start`; or the run was begun with another recipe, then the message has the differences.
        Failed: something else went wrong; the message says what.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    asked = load_fitting(name, overrides)
    run = told(lambda: RunDirectory.newest(asked.name, asked.seed) if out is None else RunDirectory(out))
    if run is None or not told(lambda run=run: run.begun):
        return start(name, overrides, out)
    run = run_at(run.path)
    distributed.remember(run.path)
    with run.alone():
        # What is wrong with another recipe is nothing that the run failed of; that memory ran out is, unless it is finished.
        with nullcontext() if run.finished else recorded(run, but=InputError):
            dataset = load_dataset(asked)
            recipe = resolve(run.as_begun(asked), dataset)
            check_same(run.made_from, recipe.model_dump(mode="json"), f"the run in {str(run.path)!r} was begun")
        if run.finished:
            return _finished_line(recipe, run)
        with recorded(run):
            setup = prepare(recipe, open_streams(recipe, dataset=dataset))
        run.write("resolved.yaml", recipe.as_yaml())
        return final_line(recipe, train(setup, run, resume=True), run)


def quickstart(overrides: Sequence[str] = (), out: Path | None = None) -> Path:
    """Say what the images are, and train the shipped recipe `quickstart` once for each of three rules.

    Arguments:
        overrides: "dotted.key=value" each, for all three runs.
        out: the folder for their run directories; by default runs/quickstart-<n>.

    Returns:
        The folder: one run directory inside for each rule, named after it.

    Raises:
        InputError: as `start`; or an override of what the quickstart itself sets.
        KeyboardInterrupt: the user stopped it.
    """
    for override in overrides:
        if override.partition("=")[0].split(".")[0] in ("feedback", "name"):
            names = ", ".join(QUICKSTART_RULES)
            raise InputError(f"quickstart compares {names} and sets feedback and name itself (got --set {override})")
    source = find("quickstart")
    recipes = {rule: load_fitting(source, (*overrides, *_quickstart_overrides(rule))) for rule in QUICKSTART_RULES}
    first = recipes[QUICKSTART_RULES[0]]
    with closing(SharedStreams()) as streams:
        prepare(first, streams.open(first))  # finds what is wrong with the data before a folder is made
        folder = told(lambda: fresh_directory(out, "quickstart"))
        console = Console(quiet=distributed.rank() != 0)
        dataset = datasets.get(first.data.dataset)
        console.print(f"{dataset.name}: {dataset.summary}", highlight=False, soft_wrap=True)
        for rule, recipe in recipes.items():
            setup = prepare(recipe, streams.open(recipe))
            run = run_at(told(partial(_quickstart_run, setup, source, folder / rule, overrides)))
            with run.alone():
                console.print(f"{rule}: {rules.get(rule).summary}", highlight=False, markup=False, soft_wrap=True)
                train(setup, run)
    return folder


def run_at(path: Path) -> RunDirectory:
    """The run directory at `path`, which rank 0 alone writes to."""
    return RunDirectory(path) if distributed.rank() == 0 else Following(path)


def _finished_line(recipe: Recipe, run: RunDirectory) -> str:
    """The final line of a run that is finished."""
    try:
        result = Result(**run.read_status()["result"])
    except (KeyError, TypeError) as error:
        what = "says that it is finished, and not with what result: remove it, and the run goes on from its last checkpoint"
        raise InputError(f"status.json in {str(run.path)!r} {what}") from error
    return f"{final_line(recipe, result, run)}: finished, there is nothing to do"


def final_line(recipe: Recipe, result: Result, run: RunDirectory) -> str:
    """What a run ends with: test error, best epoch, wall time, run directory, and how many images were skipped."""
    minutes, seconds = divmod(round(result.seconds), 60)
    published = _published(recipe)
    images = len(run.skipped)
    skipped = f"; {images:,} of its images can not be decoded: see skipped.txt there" if images else ""
    paper = "" if published is None else f" (paper: {published:g} %)"
    return (
        f"{recipe.name}: test error {result.test_error:.2f} %{paper}, best epoch {result.best_epoch} "
        f"(validation error {result.validation_error:.2f} %), {minutes} min {seconds} s, in {run.path}{skipped}"
    )


def _published(recipe: Recipe) -> float | None:
    """The paper's error in percent; None where it left the cell blank, or the recipe is on other images by now.

    A column of the paper's table is named after its dataset and the number of the network: cifar10_2.
    """
    paper = recipe.paper
    return paper.error if paper is not None and paper.column.partition("_")[0] == recipe.data.dataset else None


def _quickstart_run(setup: Setup, source: Source, out: Path, overrides: Sequence[str]) -> Path:
    changed = (*overrides, *_quickstart_overrides(out.name))
    return RunDirectory.create(setup.recipe, source, out=out, overrides=changed, choices=setup.choices).path


def _quickstart_overrides(rule: str) -> tuple[str, ...]:
    return (f"name=quickstart/{rule}", f"feedback=[{{match: '*', rule: {rule}}}]")
