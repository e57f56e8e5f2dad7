"""Starting, resuming and comparing runs from what a user typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fahooks.plugins import InputError, datasets
from fahooks.recipe import Recipe, find, load
from fahooks.report.runs import read_run
from fahooks.training.loop import Result, train
from fahooks.training.run_directory import RunDirectory, fresh_directory
from fahooks.training.setup import Setup, prepare

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
    source = find(name)
    setup = prepare(load(source, overrides))
    run = RunDirectory.create(setup.recipe, source, out=out, overrides=overrides, choices=setup.choices)
    with run.alone():
        return final_line(setup.recipe, carry_out(setup, run, resumed=False), run)


def resume(path: Path) -> str:
    """Go on with the run in `path` after its last finished epoch, and return the final line.

    Raises:
        InputError: there is no run to go on with, or another process is at it.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    run, recipe = RunDirectory.reopen(path)
    with run.alone():
        return final_line(recipe, carry_out(prepare(recipe), run, resumed=True), run)


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
            rules = ", ".join(QUICKSTART_RULES)
            raise InputError(f"quickstart compares {rules} and sets feedback and name itself (got --set {override})")
    source = find("quickstart")
    recipes = {rule: load(source, (*overrides, *_quickstart_overrides(rule))) for rule in QUICKSTART_RULES}
    prepare(recipes[QUICKSTART_RULES[0]])  # finds what is wrong with the data before a folder is made
    folder = fresh_directory(out, "quickstart")
    dataset = datasets.get(recipes[QUICKSTART_RULES[0]].data.dataset)
    Console().print(f"{dataset.name}: {dataset.summary}", highlight=False, soft_wrap=True)
    for rule, recipe in recipes.items():
        setup = prepare(recipe)
        changed = (*overrides, *_quickstart_overrides(rule))
        run = RunDirectory.create(setup.recipe, source, out=folder / rule, overrides=changed, choices=setup.choices)
        with run.alone():
            carry_out(setup, run, resumed=False)
    return folder


def carry_out(setup: Setup, run: RunDirectory, *, resumed: bool) -> Result:
    """Train what `prepare` made and leave a plot of it beside its files.

    Arguments:
        setup: what `prepare` made.
        run: where files go.
        resumed: go on after the last finished epoch of `run`.

    Raises:
        Diverged: the loss became infinite or not a number.
        KeyboardInterrupt: the user stopped it; the message says how to go on.
    """
    from fahooks.report import figures  # matplotlib is slow to import

    try:
        result = train(setup, run, resume=resumed)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; go on with `fahooks train --resume {run.path}`") from stop
    figures.comparison([read_run(run.path)], run.plots)
    return result


def final_line(recipe: Recipe, result: Result, run: RunDirectory) -> str:
    """What a run ends with: test error, best epoch, wall time, run directory."""
    minutes, seconds = divmod(round(result.seconds), 60)
    published = recipe.paper.error if recipe.paper else None
    paper = "" if published is None else f" (paper: {published:g} %)"
    return (
        f"{recipe.name}: test error {result.test_error:.2f} %{paper}, best epoch {result.best_epoch} "
        f"(validation error {result.validation_error:.2f} %), {minutes} min {seconds} s, in {run.path}"
    )


def _quickstart_overrides(rule: str) -> tuple[str, ...]:
    return (f"name=quickstart/{rule}", f"feedback=[{{match: '*', rule: {rule}}}]")
