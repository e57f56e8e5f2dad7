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


def test_a_wrong_recipe_is_a_line_for_each_of_its_problems(tmp_path: Path):
    wrong, right = tmp_path / "wrong.yaml", tmp_path / "right.yaml"
    wrong.write_text("base: quickstart\noptim: {lr: fast}\ntrian: {}\n")
    right.write_text("base: quickstart\n")
    done = validate(str(wrong), str(right), "mnist/fb")
    assert done.exit_code == 2
    first, second, third, fourth = done.stdout.splitlines()
    assert first == f"{wrong}:2: optim.lr: must be a number (got 'fast')"
    assert second == f"{wrong}:3: trian: unknown key (got {{}}) - did you mean 'train'?"
    assert third == f"{right}: ok"
    assert fourth.startswith("no recipe is named 'mnist/fb'") and "'mnist/fa'" in fourth
    assert done.stderr == "fahooks: of 3 recipes, 2 wrong\n"


def test_what_train_would_refuse_is_refused_without_data(tmp_path: Path):
    recipe = tmp_path / "b.yaml"
    recipe.write_text(
        """base: mnist/fa
data: {limit: 100, validation: 1000, root: nowhere}
"""
    )
    done = validate(str(recipe))
    problem = f"{recipe}:2: data.limit: must be more than the 1000 images of data.validation, or none are left (got 100)\n"
    assert (done.stdout, done.stderr) == (problem, "fahooks: the recipe is wrong\n")
    recipe.write_text("base: mnist/fa\nfeedback: [{match: outptu, rule: bp}, {rule: fa}]\ndata: {root: nowhere}\n")
    problem = f"{recipe}:2: feedback.0.match: 'outptu' matches none of the 4 layers - did you mean 'output'?"
    assert validate(str(recipe)).stdout == f"{problem}\n"
    train = CliRunner().invoke(main, ["train", str(recipe)])
    assert (train.exit_code, train.stderr) == (2, f"fahooks: {problem}\n")
