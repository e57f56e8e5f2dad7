from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fahooks.cli import main
from fahooks.report import table1
from fahooks.training import loop

DATA = ("data.dataset=digits", "data.limit=60", "data.validation=0.2", "data.batch_size=24")
TINY = [f"--set={o}" for o in (*DATA, "train.epochs=1", "train.device=cpu", "train.threads=1", "probes.every=null")]
TABLE = ["reproduce", "table1", "--columns", "mnist", "--rows", "BP"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    return go


def test_the_table_is_printed_and_written_also_when_everything_was_there(run):
    done = run(*TABLE, "--seeds", "0, 1", *TINY)
    assert (done.exit_code, done.stderr) == (0, "")
    (cell,) = table1.read(Path("runs/table1"))
    assert cell.seeds == (0, 1)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "runs/table1: 2 runs, 0 of them finished, 2 to train"
    at = lines.index(" ".join(cell.texts()))
    changed = f"changed by --set: {' '.join(setting.removeprefix('--set=') for setting in TINY)} (in mnist/bp)"
    assert lines[at + 1 :] == ["", table1.CAPTION, changed, "written: runs/table1/table1.csv, runs/table1/table1.md"]
    assert "\x1b" not in done.stdout
    files = [Path("runs/table1") / name for name in ("table1.csv", "table1.md")]
    texts = [file.read_text() for file in files]
    settings = " ".join(setting.replace("=", " ", 1) for setting in TINY)
    command = f"fahooks reproduce table1 --columns mnist --rows bp --seeds 0,1 {settings}"
    assert texts[1].splitlines()[-1].strip() == command
    for file in files:
        file.unlink()
    Path("runs/table1/mnist/fa/seed-0").mkdir(parents=True)
    again = run(*TABLE, "--seeds", "0", *TINY)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[0] == "runs/table1: 1 run, 1 of them finished, 0 to train"
    assert "not in the table: mnist/fa/seed-0 (begun)" in again.stdout
    assert [file.read_text() for file in files] == texts


def test_a_run_that_diverged_is_said_at_the_end_with_exit_2(run):
    done = run(*TABLE, *TINY, "--set=optim.lr=1e30")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fahooks: mnist/bp, seed 0: the loss was ")
    assert not Path("runs/table1/table1.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "tabel1"], "fahooks: 'tabel1' can not be reproduced - did you mean 'table1'?; there is table1"),
        ([*TABLE, "--seeds", "0,x"], "fahooks: --seeds must be whole numbers from 0 on, such as 0,1,2 (got '0,x')"),
        ([*TABLE, "--seeds", "-1"], "fahooks: --seeds must be whole numbers"),
        ([*TABLE, "--columns", "minst"], "fahooks: Table 1 has no column 'minst' - did you mean 'mnist'?"),
        ([*TABLE, *TINY, "--set", "seed=1"], "fahooks: reproduce takes name and paper from its recipes"),
        ([*TABLE, "--set", "data.root=nowhere", "--set", "data.download=false"], "fahooks: mnist is not at nowhere/"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_2(run, arguments: list[str], message: str):
    done = run(*arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not list(Path().iterdir())


def test_a_stopped_command_says_that_it_goes_on_and_does(run, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop)
        done = run(*TABLE, *TINY)
    assert (done.exit_code, done.stderr) == (130, "fahooks: stopped; the same command goes on from there\n")
    done = run(*TABLE, *TINY, "--out", str(Path("runs/table1").absolute()))
    assert done.exit_code == 0
    assert "1 of 1: mnist/bp, seed 0: goes on" in done.stdout
