"""`fahooks eval`: the errors of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from .arguments import SETTINGS
from .stopping import importing, together


@click.command(name="eval", epilog="Example: fahooks eval runs/quickstart-1/fa --weights last")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--weights", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Which weights of the run."
)
@SETTINGS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def evaluate(run: Path, weights: Literal["best", "last"], overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the validation and test error of the run in the directory RUN.

    It may be finished or not, and nothing is written. The best weights are those with the lowest validation error, the last ones
    those of the newest checkpoint. --set evaluates on other images (data....), which are normalised as those that were trained
    on, or elsewhere (train.device, train.threads).
    """
    with importing():
        from fahooks.training import distributed
        from fahooks.training.evaluation import evaluate_run

    with together("stopped; nothing was measured"):
        found = evaluate_run(run, weights, overrides)
        if distributed.rank() != 0:
            return
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    taken = "" if found.step is None else f" after step {found.step:,}"
    click.echo(f"{found.recipe.name}, {weights} weights{taken}, on {found.recipe.data.dataset}")
    for name, values in (("validation", found.validation), ("test", found.test)):
        images = f"{values['images']:,} images" + (f", {values['skipped']:,} skipped" if values["skipped"] else "")
        click.echo(f"{name:<10}  error {values['error']:.2f} %  loss {values['loss']:.4f}  of {images}")
