from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from fahooks.cli import main
from fahooks.recipe import shipped_names


def validate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["validate", *arguments])


def test_every_shipped_recipe_is_right():
    done = validate()
    assert done.stdout.splitlines() == [f"{name}: ok" for name in shipped_names()]
    assert "mnist/fa-usf-sn: ok" in done.stdout
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_wrong_recipe_is_one_line_with_all_its_problems(tmp_path: Path):
    wrong, right = tmp_path / "wrong.yaml", tmp_path / "right.yaml"
    wrong.write_text("base: quickstart\noptim: {lr: fast}\ntrian: {}\n")
    right.write_text("base: quickstart\n")
    done = validate(str(wrong), str(right), "mnist/fb")
    assert done.exit_code == 2
    first, second, third = done.stdout.splitlines()
    assert first == (
        f"{wrong}: {wrong}:2: optim.lr: must be a number (got 'fast'); "
        f"{wrong}:3: trian: unknown key (got {{}}) - did you mean 'train'?"
    )
    assert second == f"{right}: ok"
    assert third.startswith("mnist/fb: no recipe is named 'mnist/fb'") and "'mnist/fa'" in third
    assert done.stderr == "fahooks: 2 of 3 recipes are wrong\n"
