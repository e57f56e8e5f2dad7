from __future__ import annotations

from pathlib import Path

import pytest

from fahooks.recipe import RecipeError, Source, explain, find, load, shipped_names

CHILD = """\
base: parent.yaml
name: child
feedback: [{rule: fa, gain: 2.0}]
optim:
  lr: 1e-2
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A recipe on a recipe on a shipped one."""
    monkeypatch.chdir(tmp_path)
    Path("parent.yaml").write_text("base: quickstart\noptim: {weight_decay: 0.5}\n")
    Path("child.yaml").write_text(CHILD)
    return find("child.yaml")


def test_every_value_says_where_it_was_written(child: Source):
    lines = {line.text.strip(): line.origin for line in explain(child, ["train.epochs=7"])}
    assert lines["name: child"] == "child.yaml:2"
    assert (lines["rule: fa"], lines["gain: 2.0"], lines["distribution: normal"]) == ("child.yaml:3", "child.yaml:3", "default")
    assert lines["lr: 0.01"] == "child.yaml:5"
    assert lines["weight_decay: 0.5"] == "base parent.yaml:2"
    assert lines["schedule:"] == ""
    assert lines["name: cosine"] == "base fahooks/recipes/quickstart.yaml:8"
    assert lines["epochs: 7"] == "--set"
    assert lines["device: auto"] == lines["betas: [0.9, 0.999]"] == "default"


def test_what_the_images_decide_is_left_to_them_unless_it_is_said(child: Source):
    texts = [line.text.strip() for line in explain(child)]
    assert "activation: relu" in texts and not any(text.startswith("classes:") for text in texts)
    said = {line.text.strip(): line.origin for line in explain(child, ["model.classes=7"])}
    assert said["classes: 7"] == "--set"


@pytest.mark.parametrize("name", shipped_names()[::7])
def test_the_lines_are_the_recipe(name: str):
    changes = ["data.augment=[{crop: {padding: 4}}, {flip: {}}]", "hooks=[{name: alignment, match: [a, b*]}]", "data.root='x: y'"]
    text = "\n".join(line.text for line in explain(find(name), changes))
    again, asked = load(Source("again.yaml", text)).model_dump(), load(name, changes).model_dump()
    for section in ("name", "paper", "optim", "schedule", "train", "seed", "probes"):
        assert again[section] == asked[section]
    assert again["data"]["root"] == "x: y" and [*again["data"]["augment"][0]] == ["crop"]
    assert again["hooks"][0]["match"] == ["a", "b*"]
    assert [entry["rule"] for entry in again["feedback"]] == [entry["rule"] for entry in asked["feedback"]]


def test_a_wrong_recipe_is_refused_as_ever(child: Source):
    with pytest.raises(RecipeError, match="--set: optim.lr: must be a number"):
        explain(child, ["optim.lr=x"])
