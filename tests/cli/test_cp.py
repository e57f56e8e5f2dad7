from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fahooks.cli import main
from fahooks.recipe import find, load


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def cp(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cp", *arguments])


def test_a_copy_is_the_same_recipe():
    done = cp("cifar10-1/fa.yaml", "mine.yaml")
    assert (done.exit_code, done.stdout) == (
        0,
        "mine.yaml: a copy of cifar10-1/fa.yaml; edit it, then `fahooks train mine.yaml`\n",
    )
    assert Path("mine.yaml").read_text() == find("cifar10-1/fa").text
    assert load("mine.yaml") == load("cifar10-1/fa")


@pytest.mark.parametrize(
    ("recipe", "file", "message"),
    [
        ("mnist/fa", "there.yaml", "fahooks: 'there.yaml' is there already: name a new file"),
        ("mnist/fa", ".", "fahooks: '.' is there already: name a new file"),
        ("mnist/fa", "no/where.yaml", "fahooks: 'no/where.yaml' can not be written: No such file or directory"),
        ("mnist/fb", "new.yaml", "fahooks: no shipped recipe is named 'mnist/fb' - did you mean 'mnist/fa'"),
        ("there.yaml", "new.yaml", "fahooks: no shipped recipe is named 'there.yaml'"),
        ("_base/mnist", "new.yaml", "fahooks: no shipped recipe is named '_base/mnist'"),
    ],
)
def test_what_can_not_be_copied_is_one_line_and_nothing_is_overwritten(recipe: str, file: str, message: str):
    Path("there.yaml").write_text("mine")
    done = cp(recipe, file)
    assert done.exit_code == 2
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("there.yaml", "mine")]
