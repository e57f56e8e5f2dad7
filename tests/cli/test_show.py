from __future__ import annotations

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


def test_show_refuses_as_train_does():
    done = CliRunner().invoke(main, ["show", "mnist/fb"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("fahooks: no recipe is named 'mnist/fb'") and "'mnist/fa'" in done.stderr
