from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from fahooks.cli import main

SMALL = ("data.limit=120", "data.batch_size=40", "train.epochs=1", "train.device=cpu", "train.threads=1")


def test_eval_prints_a_line_a_split_or_json(tmp_path: Path):
    run = CliRunner().invoke
    trained = run(main, ["train", "quickstart", *(f"--set={change}" for change in SMALL), "--out", str(tmp_path / "run")])
    assert trained.exit_code == 0, trained.output
    done = run(main, ["eval", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "status.json").read_text())["result"]
    first, validation, test = done.stdout.splitlines()
    assert first == "quickstart, best weights, on digits"
    assert validation.startswith(f"validation  error {result['validation_error']:.2f} %  loss ") and validation.endswith(
        "of 24 images"
    )
    assert test.startswith(f"test        error {result['test_error']:.2f} %  loss ") and test.endswith("of 360 images")
    document = json.loads(run(main, ["eval", str(tmp_path / "run"), "--weights", "last", "--json"]).stdout)
    assert (document["step"], document["test"]["error"]) == (3, result["final_test_error"])


def test_what_is_no_run_is_one_line_and_exit_2(tmp_path: Path):
    done = CliRunner().invoke(main, ["eval", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"fahooks: {str(tmp_path)!r} is no run directory: it has no resolved.yaml\n"
