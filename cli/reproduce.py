"""`fahooks reproduce`: the paper's Table 1, ours beside the published one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from fahooks.plugins import InputError, near

from .arguments import SETTINGS, names, numbers
from .stopping import importing, together
from .tables import print_result

TABLES = ("table1",)


@click.command(epilog="Example: fahooks reproduce table1 --columns mnist --rows bp,fa --seeds 0,1,2")
@click.argument("table", metavar="table1")
@click.option("--columns", metavar="NAMES", help="Such as mnist,cifar10-1; all by default.")
@click.option("--rows", metavar="NAMES", help="Such as bp,fa-usf-sn or 'BP + Noise'; all by default.")
@click.option("--seeds", default="0", show_default=True, metavar="NUMBERS", help="One run a cell for each, such as 0,1,2.")
@SETTINGS
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the runs and the table.  [default: runs/table1]")
def reproduce(
    table: str, columns: str | None, rows: str | None, seeds: str, overrides: tuple[str, ...], out: Path | None
) -> None:
    """Train what is missing of the paper's Table 1, and set ours beside the paper's.

    A cell is a shipped recipe (`fahooks ls recipes`), its runs lie in OUT/RECIPE/seed-N. Finished ones are taken as they are,
    interrupted ones go on. Then everything that is finished in OUT is printed as a table, and written to OUT/table1.csv and
    OUT/table1.md. Several processes may fill one OUT; those that torchrun started train each run together.
    """
    with importing():
        from fahooks.training import distributed, reproduction

    if table not in TABLES:
        raise InputError(f"{table!r} can not be reproduced{near(table, TABLES)}; there is {', '.join(TABLES)}")
    out = out or reproduction.OUT
    with together():
        diverged = reproduction.reproduce(names("--columns", columns), names("--rows", rows), numbers(seeds), overrides, out)
        distributed.told(partial(_report, out))  # the others wait for it: torchrun ends all processes when the first one fails
        if diverged:
            raise InputError("\n".join(diverged))


def _report(out: Path) -> None:
    from fahooks.report import table1
    from fahooks.training import reproduction

    cells = reproduction.write_table(out)
    if not cells:
        return
    print_result(table1.table(cells))
    click.echo(f"\n{table1.CAPTION}")
    for line in table1.changes(cells):
        click.echo(line)
    for path in table1.unfinished(out):
        click.echo(f"not in the table: {path}")
    click.echo(f"written: {out / 'table1.csv'}, {out / 'table1.md'}")
