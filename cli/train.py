"""`fahooks train` and `fahooks quickstart`."""

from __future__ import annotations

from pathlib import Path

import click

from fahooks.plugins import InputError

from .arguments import SETTINGS, RecipeName, numbers
from .stopping import importing, together
from .tables import print_result


@click.command(epilog="Example: fahooks train mnist/fa --set train.epochs=1 --set seed=1 --out runs/try")
@click.argument("recipe", type=RecipeName(), required=False)
@SETTINGS
@click.option("--out", type=click.Path(path_type=Path), help="Run directory, new or empty; by default runs/<recipe name>-<n>.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR|auto",
    help="Go on with the run in this run directory; auto: with the newest run of RECIPE and its seed, or begin one.",
)
@click.option("--max-steps", type=click.IntRange(1), help="End after so many steps, as --set train.max_steps does.")
@click.option("--seeds", metavar="NUMBERS", help="One run for each, such as 0,1,2, and a table of mean and spread.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=VALUES",
    help="One run for each value, such as optim.lr=1e-3,1e-4; repeatable, then one for each combination.",
)
@click.option("--dry-run", is_flag=True, help="Take two steps, say what the run would cost, and write nothing.")
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    max_steps: int | None,
    seeds: str | None,
    sweeps: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Train RECIPE: the name of a shipped recipe (`fahooks ls recipes`) or a file.

    With --seeds or --sweep it trains a series, in OUT or runs/<recipe name>-sweep, of which the same command, given again, trains
    what is missing. In several processes: torchrun --nproc-per-node 2 -m fahooks train RECIPE
    """
    with importing():
        from fahooks.training import commands, distributed

    auto = resume == Path("auto")
    if max_steps is not None:
        for option, settings in (("--set", overrides), ("--sweep", sweeps)):
            for setting in settings:
                if setting.partition("=")[0].strip() == "train.max_steps":
                    raise InputError(f"--max-steps {max_steps} and {option} {setting} say the same: leave one of them away")
        overrides = (*overrides, f"train.max_steps={max_steps}")
    with together():
        if dry_run:
            if recipe is None or resume is not None or out is not None or seeds is not None or sweeps:
                raise InputError("--dry-run takes a RECIPE, and neither --resume, --out, --seeds nor --sweep: it writes nothing")
            _dry_run(recipe, overrides)
            return
        if seeds is not None or sweeps:
            if recipe is None or resume is not None:
                raise InputError("--seeds and --sweep take a RECIPE and no --resume: the same command goes on by itself")
            _sweep(recipe, overrides, sweeps, seeds, out)
            return
        if resume is not None and not auto:
            if recipe or overrides or out:
                raise InputError("--resume DIR takes everything from there: leave RECIPE, --set, --max-steps and --out away")
            line = commands.resume(resume)
        elif recipe is None:
            raise InputError("name a recipe, such as mnist/fa (`fahooks ls recipes` lists all), or --resume a run directory")
        else:
            line = commands.resume_newest(recipe, overrides, out) if auto else commands.start(recipe, overrides, out)
        if distributed.rank() == 0:
            click.echo(line)


def _sweep(recipe: str, overrides: tuple[str, ...], sweeps: tuple[str, ...], seeds: str | None, out: Path | None) -> None:
    from fahooks.report import tables
    from fahooks.report.runs import read_run
    from fahooks.training import distributed, sweep

    planned = sweep.plan(recipe, overrides, sweeps, None if seeds is None else numbers(seeds), out)
    diverged = sweep.train_missing(planned)

    def report() -> None:
        runs = {", ".join(s) or recipe: [read_run(path) for path in planned.paths(s)] for s in planned.settings}
        print_result(tables.by_settings(runs))
        click.echo(f"runs in {planned.out}")

    distributed.told(report)  # the others wait for it: torchrun ends all processes when the first one fails
    if diverged:
        raise InputError("\n".join(diverged))


def _dry_run(recipe: str, overrides: tuple[str, ...]) -> None:
    from fahooks.training import distributed
    from fahooks.training.dry_run import dry_run

    cost = dry_run(recipe, overrides)
    if distributed.rank() != 0:
        return
    click.echo(f"{cost.setup.report}\n")
    for word, sentence in cost.lines():
        click.echo(f"{word:<6}  {sentence}")


@click.command(epilog="Example: fahooks quickstart --set train.epochs=10")
@SETTINGS
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the runs, new or empty; by default runs/quickstart-<n>.")
def quickstart(overrides: tuple[str, ...], out: Path | None) -> None:
    """Train bp, fa and usf_sn on real digits, on a CPU in about a minute, and compare them.

    The digits are the 1,797 handwritten ones, 8x8 pixels, that scikit-learn ships: nothing is downloaded.
    With --set data.dataset=mnist it takes MNIST: found under data.root, else downloaded there.
    """
    with importing():
        from fahooks.report import figures, tables
        from fahooks.report.runs import read_run
        from fahooks.training import commands, distributed

    with together():
        folder = commands.quickstart(overrides, out)
        if distributed.rank() != 0:
            return
        runs = [read_run(folder / rule) for rule in commands.QUICKSTART_RULES]
        figures.comparison(runs, folder / "quickstart.png")
        print_result(tables.comparison(runs))
        click.echo(f"figure {folder / 'quickstart.png'}, runs in {folder}")
