from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fahooks.cli import main

SMALL = [f"--set={o}" for o in ("data.limit=120", "train.epochs=1", "train.device=cpu", "probes.every=1")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments), prog_name="fahooks")

    return go


def test_train_ends_with_the_test_error_and_the_place(run):
    done = run("train", "quickstart", *SMALL, "--out", "here")
    assert done.exit_code == 0, done.output
    *epochs, last = done.output.splitlines()
    assert epochs[-1].startswith("epoch 1/1")
    assert last.startswith("quickstart: test error ") and last.endswith("in here")
    assert json.loads(Path("here/status.json").read_text())["state"] == "finished"


def test_a_wrong_recipe_prints_all_its_problems_and_exits_2(run):
    Path("r.yaml").write_text("base: quickstart\nname: mine\noptim: {lr: fast}\ntrian: {}\n")
    done = run("train", "r.yaml", "--set", "seed=x")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "fahooks: r.yaml:3: optim.lr: must be a number (got 'fast')",
        "--set: seed: must be an integer (got 'x')",
        "r.yaml:4: trian: unknown key (got {}) - did you mean 'train'?",
    ]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "fahooks: name a recipe, such as mnist/fa"),
        (
            ["train", "quickstart", "--seeds"],
            "fahooks: Option '--seeds' requires an argument; `fahooks train --help` lists what it takes",
        ),
        (["train", "mnist/fb"], "fahooks: no recipe is named 'mnist/fb'"),
        (["train", "mnist/fa", "--resume", "x"], "fahooks: --resume DIR takes everything from there"),
        (["train", "--resume", "x", "--set", "seed=1"], "fahooks: --resume DIR takes everything from there"),
        (
            ["train", "--resume", "x", "--max-steps", "3"],
            "fahooks: --resume DIR takes everything from there: leave RECIPE, --set, --max-steps",
        ),
        (["train", "--resume", "absent"], "fahooks: 'absent' is no run directory"),
        (
            ["train", "mnist/fa", "--set", "data.root=nowhere", "--set", "data.download=false"],
            "fahooks: mnist is not at nowhere/MNIST/raw/",
        ),
        (["train", "mnist/fa", "--seeds", "0,x"], "fahooks: --seeds must be whole numbers from 0 on, such as 0,1,2 (got '0,x')"),
        (["train", "mnist/fa", "--seeds", "0,1,00"], "fahooks: --seeds has 0 twice: give it once"),
        (
            ["train", "mnist/fa", "--max-steps", "3", "--set", "train.max_steps=4"],
            "fahooks: --max-steps 3 and --set train.max_steps=4 say the same: leave one of them away",
        ),
        (
            ["train", "mnist/fa", "--max-steps", "3", "--sweep", "train.max_steps=4,5"],
            "fahooks: --max-steps 3 and --sweep train.max_steps=4,5 say the same: leave one of them away",
        ),
        (["train", "mnist/fa", "--seeds", "0", "--resume", "auto"], "fahooks: --seeds and --sweep take a RECIPE and no --resume"),
        (["train", "mnist/fa", "--sweep", "seed=1"], "fahooks: --sweep can not change seed; --seeds does"),
        (["train", "--dry-run"], "fahooks: --dry-run takes a RECIPE, and neither --resume, --out"),
        (["train", "mnist/fa", "--dry-run", "--out", "x"], "fahooks: --dry-run takes a RECIPE, and neither --resume, --out"),
        (["quickstart", "--set", "feedback=[]"], "fahooks: quickstart compares bp, fa, usf_sn"),
        (["quickstart", "--set", "data.dataset=digit"], "fahooks: --set: data.dataset: no dataset is named 'digit'"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_2(run, arguments: list[str], message: str):
    done = run(*arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not list(Path().iterdir())


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch(run):
    done = run(
        "train", "quickstart", *SMALL, "--set=data.batch_size=40", "--set=train.epochs=9", "--max-steps", "4", "--out", "here"
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows if row["kind"] == "epoch"] == [(1, 3), (2, 4)]
    assert "max_steps: 4" in Path("here/resolved.yaml").read_text()


def test_a_dry_run_says_what_it_costs_and_writes_nothing(run):
    done = run("train", "quickstart", *SMALL, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "conv1   Conv2d  32x1x5x5" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-7:]] == [
        *("data", "loader", "steps", "loss", "speed", "memory", "time")
    ]
    assert list(Path().iterdir()) == []


def test_a_sweep_ends_with_a_table_and_trains_nothing_twice(run):
    command = ["train", "quickstart", *SMALL, "--sweep", "optim.lr=1e-3,1e-4", "--seeds", "0,1"]
    first, second = run(*command), run(*command)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    rows = [[line.split()[:2] for line in done.stdout.splitlines() if line.startswith("  optim.lr")] for done in (first, second)]
    assert rows[0] == rows[1] == [["optim.lr=1e-3", "2"], ["optim.lr=1e-4", "2"]]
    assert second.stdout.startswith("runs/quickstart-sweep: 4 runs, 4 of them finished, 0 to train\n")
    assert second.stdout.endswith("runs in runs/quickstart-sweep\n")


def test_quickstart_prints_a_table_and_saves_a_figure(run):
    done = run("quickstart", *SMALL)
    assert done.exit_code == 0, done.output
    assert "scikit-learn" in done.output.splitlines()[0]
    rows = [line.split()[0] for line in done.output.splitlines() if line.startswith("  ") and "%" in line]
    assert rows == ["bp", "fa", "usf_sn"]
    assert "angle conv1" in done.output and "0.0°" in done.output
    assert Path("runs/quickstart-1/quickstart.png").stat().st_size > 10_000
    assert [line.partition(":")[0] for line in done.output.splitlines() if line.startswith(("bp:", "fa:", "usf_sn:"))] == [
        *("bp", "fa", "usf_sn")
    ]
    assert done.output.splitlines()[-1] == "figure runs/quickstart-1/quickstart.png, runs in runs/quickstart-1"


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_does(stop: signal.Signals, tmp_path: Path):
    command = [sys.executable, "-m", "fahooks", "train"]
    start = [*command, "quickstart", "--set=train.epochs=1000", "--set=train.device=cpu", "--set=data.limit=200", "--out", "here"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that starts tests in the background has them ignore Ctrl-C.
    process = subprocess.Popen(start, cwd=tmp_path, env=environment, **pipes, preexec_fn=heed_interrupts)
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch 2/"):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert re.fullmatch(r"fahooks: stopped after step \d+, which is saved; go on with `fahooks train --resume here`", line)
    status = json.loads((tmp_path / "here" / "status.json").read_text())
    assert (status["state"], status["resume"]) == ("interrupted", "fahooks train --resume here")
