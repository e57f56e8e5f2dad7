from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fahooks.cli import main

SMALL = ["bench", "step", "paper/mnist", "--batch", "2", "--rounds", "2"]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*SMALL, *arguments])


def test_bench_step_prints_a_row_a_rule_and_writes_json(tmp_path: Path):
    file = tmp_path / "bench.json"
    done = bench("--image", "12", "--rules", "fa, dfa", "--json", str(file))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("paper/mnist, 2 images of 1x12x12, 2 rounds, 1 CPU thread, torch ")
    assert [line.split("  ")[0] for line in lines[2:]] == ["backprop", "backprop again", "fa", "dfa"]
    document = json.loads(file.read_text())
    assert document["about"] == lines[0]
    assert [timing["name"] for timing in document["timings"]] == ["backprop", "backprop again", "fa", "dfa"]
    assert set(document["timings"][2]["ratios"]["cpu"]) == {"low", "median", "high"}


def test_bench_step_leaves_stderr_to_warnings():
    """Also where torch is there already, and its log level can not be set any more."""
    program = f"import torch\nfrom fahooks.cli import main\nmain({[*SMALL, '--image', '12', '--rules', 'fa,brsf,kp,wm']})"
    environment = {name: value for name, value in os.environ.items() if "LOG_LEVEL" not in name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("\n") == 8
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "fs"], "no rule is named 'fs'"),
        (["--device", "cuda"], "--device cuda, but torch finds no GPU here"),
        (["--image", "2"], "needs images of at least 4x4 pixels"),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], message: str):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_model_that_does_not_run_on_such_images_is_refused_in_one_line():
    done = CliRunner().invoke(
        main, ["bench", "step", "timm/vit_tiny_patch16_224", "--image", "37", "--batch", "2", "--rules", "fa"]
    )
    assert done.exit_code == 2
    assert "does not run on 2 images of shape (3, 37, 37) (--batch and --image set others): AssertionError" in done.stderr


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("(self.layer(x.mean((2, 3))),)", "does not return a number for each of 10 classes (--classes sets how many): Type"),
        ("self.layer(x.mean((2, 3)))[:, :9]", "does not return a number for each of 10 classes (--classes sets how many): Index"),
        ("self.layer(x.mean((2, 3))).detach()", "has no parameters to train"),
    ],
    ids=["a tuple", "too few", "nothing to train"],
)
def test_a_model_that_takes_no_step_is_refused_in_one_line(tmp_path: Path, returned: str, message: str):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    input_size = (3, 4, 4)\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.layer = nn.Linear(3, 10).requires_grad_({'detach' not in returned})\n"
        "    def forward(self, x):\n"
        f"        return {returned}\n"
        "def make():\n"
        "    return Net()\n"
    )
    done = CliRunner().invoke(main, ["bench", "step", f"{file}:make", "--batch", "2", "--rules", "fa"])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"fahooks: '{file}:make' {message}") and done.stderr.count("\n") == 1


def test_bench_loop_compares_the_loop_with_a_minimal_one():
    settings = ["--set=data.limit=200", "--set=train.device=cpu"]
    done = CliRunner().invoke(main, ["bench", "loop", "quickstart", "--rounds", "2", *settings])
    assert done.exit_code == 0, done.output
    about, header, *rows = done.stdout.splitlines()
    assert about.startswith("quickstart, 2 rounds, ") and header.startswith("loop  ")
    assert [row[:18].strip() for row in rows] == ["minimal loop", "minimal loop again", "fahooks train"]
