from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner

from fahooks.cli import main


def test_show_prints_yaml_with_the_origin_of_each_value():
    done = CliRunner().invoke(main, ["show", "mnist/fa", "--set", "train.epochs=1"])
    assert done.exit_code == 0
    assert "name: mnist/fa  # fahooks/recipes/mnist/fa.yaml:2" in done.stdout.splitlines(), "nothing to align into a pipe"
    lines = [[part.strip() for part in line.split("  #")] for line in done.stdout.splitlines()]
    assert ["name: mnist/fa", "fahooks/recipes/mnist/fa.yaml:2"] in lines
    assert ["epochs: 1", "--set"] in lines
    assert ["train:"] in lines


def test_what_is_read_by_programs_is_never_coloured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = CliRunner().invoke(main, ["show", "mnist/fa"]).stdout
    assert "\x1b" not in shown and yaml.safe_load(shown)["name"] == "mnist/fa"
    assert "\x1b" not in CliRunner().invoke(main, ["ls", "rules"]).stdout
    converted = CliRunner().invoke(main, ["convert", "paper/mnist", "--rule", "fa", "--json"]).stdout
    assert json.loads(converted)["totals"]["converted"] == 4
    assert "\x1b" not in CliRunner().invoke(main, ["convert", "paper/mnist", "--rule", "fa"]).stdout


def test_show_refuses_as_train_does():
    done = CliRunner().invoke(main, ["show", "mnist/fb"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("fahooks: no recipe is named 'mnist/fb'") and "'mnist/fa'" in done.stderr
