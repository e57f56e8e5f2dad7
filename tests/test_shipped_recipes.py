from __future__ import annotations

import contextlib
import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fahooks import models, recipe
from fahooks.recipe import Adam, Recipe, Step, load

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs" / "recipes.md").read_text()

# Table 1 of the paper, in percent; the last row of its methods that a network ran.
COLUMNS = ("mnist", "cifar10_1", "cifar10_2", "imagenet_1", "imagenet_2")
BLANK = None
TABLE_1: dict[str, tuple[float | None, ...]] = {
    "BP": (0.8, 17.2, 11.0, 79.5, 45.5),
    "BP + Noise": (0.8, 17.4, 11.0, 79.2, 46.0),
    "BP + Alignment": (0.9, 17.4, 11.2, 79.4, 45.9),
    "FA": (1.1, 26.6, 35.6, 95.2, 94.5),
    "FA-uSF Init. E/I": (0.9, 18.9, 17.8, 86.9, 67.8),
    "FA-uSF Init.": (0.7, 17.6, 13.1, 79.6, 60.1),
    "FA-uSF SN": (0.7, 17.7, 12.6, 78.9, 54.4),
    "DFA": (1.0, 28.6, BLANK, BLANK, BLANK),
    "DenseFA": (0.7, 16.9, BLANK, BLANK, BLANK),
}
CONSTANT_NORM = {"BP Const.": 46.9, "FA-uSF Const.": 51.2, "FA-uSF Const. E/I": 66.1}
CELLS = {(row, column): error for row, errors in TABLE_1.items() for column, error in zip(COLUMNS, errors, strict=True)}
CELLS |= {(row, "imagenet_2"): error for row, error in CONSTANT_NORM.items()}

FILES = {
    "BP": "bp",
    "BP + Noise": "bp-noise",
    "BP + Alignment": "bp-alignment",
    "FA": "fa",
    "FA-uSF Init. E/I": "fa-usf-init-ei",
    "FA-uSF Init.": "fa-usf-init",
    "FA-uSF SN": "fa-usf-sn",
    "DFA": "dfa",
    "DenseFA": "dense-fa",
    "BP Const.": "bp-const",
    "FA-uSF Const.": "fa-usf-const",
    "FA-uSF Const. E/I": "fa-usf-const-ei",
}

# Rule and hooks of a row.
ALIGNMENT: dict[str, Any] = {"name": "alignment", "strength": 0.001}
FREEZE: dict[str, Any] = {"name": "freeze_signs", "after": 0.05}
NORM: dict[str, Any] = {"name": "constant_norm"}
METHODS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "BP": ("bp", []),
    "BP + Noise": ("bp_noise", []),
    "BP + Alignment": ("bp", [ALIGNMENT]),
    "FA": ("fa", []),
    "FA-uSF Init. E/I": ("usf_init", [FREEZE]),
    "FA-uSF Init.": ("usf_init", []),
    "FA-uSF SN": ("usf_sn", []),
    "DFA": ("dfa", []),
    "DenseFA": ("dense_fa", []),
    "BP Const.": ("bp", [NORM]),
    "FA-uSF Const.": ("usf_init", [NORM]),
    "FA-uSF Const. E/I": ("usf_init", [FREEZE, NORM]),
}

# How the blank cells keep, or do not keep, their matrices.
STORAGE = {
    ("DFA", "cifar10_2"): "dense",
    ("DFA", "imagenet_1"): "seeded",
    ("DFA", "imagenet_2"): "seeded",
    ("DenseFA", "cifar10_2"): "channel",
    ("DenseFA", "imagenet_1"): "seeded",
    ("DenseFA", "imagenet_2"): "channel",
}

# Section 7.1 where it speaks, else docs/recipes.md: learning rate, epochs between decays, factor, epochs, images a batch.
TRAINING = {
    "mnist": (1e-4, 20, 0.1, 25, 50),
    "cifar10_1": (5e-4, 30, 0.8, 154, 128),
    "cifar10_2": (5e-4, 120, 0.1, 256, 128),
    "imagenet_1": (1e-4, 20, 0.8, 100, 128),
    "imagenet_2": (5e-4, 47, 0.1, 100, 128),
}

SEEN = {"mnist": 28, "cifar10_1": 24, "cifar10_2": 32, "imagenet_1": 299, "imagenet_2": 299}


def name_of(row: str, column: str) -> str:
    return f"{column.replace('_', '-')}/{FILES[row]}"


def test_every_cell_of_table_1_has_a_recipe_and_every_recipe_a_cell():
    filled = [cell for cell, error in CELLS.items() if error is not None]
    assert (len(filled), len(CELLS)) == (42, 48)
    assert {name_of(*cell) for cell in CELLS} == set(recipe.shipped_names()) - {"quickstart"}
    assert {cell for cell, error in CELLS.items() if error is None} == set(STORAGE)


def test_the_frozen_table_is_that_of_the_paper():
    file = ROOT.parent / "shared" / "paper" / "table1.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not there: Table 1 of the paper, a row a method, a column a network")
    with file.open() as lines:
        rows = {row.pop("method"): row for row in csv.DictReader(lines)}
    printed = {(row, column): float(error) for row, errors in rows.items() for column, error in errors.items() if error}
    assert printed == {cell: error for cell, error in CELLS.items() if error is not None}


def test_every_shipped_recipe_is_right_and_bears_its_own_name():
    for name in recipe.shipped_names():
        assert load(name).name == name


@pytest.mark.parametrize("row", FILES)
def test_a_row_of_table_1_is_one_method(row: str):
    rule, hooks = METHODS[row]
    for column in COLUMNS:
        if (row, column) not in CELLS:
            continue
        read = load(name_of(row, column))
        assert read.paper == recipe.Paper(table=1, row=row, column=column, error=CELLS[row, column])
        options = {"feedback": STORAGE[row, column]} if (row, column) in STORAGE else {}
        assert [(f.match, f.rule, f.options) for f in read.feedback] == [("*", rule, options)]
        assert [{"name": hook.name, **hook.options} for hook in read.hooks] == hooks


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_of_table_1_is_one_network_and_its_training(column: str):
    lr, every, gamma, epochs, batch_size = TRAINING[column]
    network = column.replace("_", "-")
    for row in FILES:
        if (row, column) not in CELLS:
            continue
        read = load(name_of(row, column))
        # Where norms are constant there is nothing for decay to do.
        assert read.optim == Adam(name="adam", lr=lr, weight_decay=0.0 if row in CONSTANT_NORM else 1e-3)
        assert read.schedule == Step(name="step", every=every, gamma=gamma)
        assert (read.train.epochs, read.data.batch_size) == (epochs, batch_size)
        assert (read.model.name, read.model.options) == (f"paper/{network}", {"init": "fan_in"})
        assert read.data.dataset == network.partition("-")[0]
    assert load(name_of("BP", column)).data.augment == {
        "cifar10_1": [{"crop": {"size": 24}}, {"flip": {}}],
        "imagenet_1": [{"flip": {}}],
        "imagenet_2": [{"flip": {}}],
    }.get(column, [])
    with torch.device("meta"):
        assert models.input_size(models.build(read.model.name), read.model.name)[1:] == (SEEN[column], SEEN[column])


# docs/recipes.md.


def method(read: Recipe) -> str:
    """The rule and the hooks of a recipe as its file has them."""
    (feedback,) = read.feedback
    parts = [(feedback.rule, feedback.options), *((hook.name, hook.options) for hook in read.hooks)]
    shown = [
        f"`{name}`" + (f" ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "") for name, options in parts
    ]
    return " + ".join(shown)


def test_the_docs_list_every_recipe():
    expected = []
    for row, column in CELLS:
        read = load(name_of(row, column))
        paper = "blank" if CELLS[row, column] is None else f"{CELLS[row, column]} %"
        expected.append(f"| `{read.name}` | {row} | {paper} | {method(read)} |")
    expected.sort(key=lambda line: COLUMNS.index(re.findall(r"`(.*?)/", line)[0].replace("-", "_")))
    listed = [line for line in DOCS.splitlines() if re.match(r"\| `(mnist|cifar10-\d|imagenet-\d)/", line)]
    assert listed == expected, "\n" + "\n".join(expected)


def test_the_docs_print_what_their_program_prints():
    ((program, printed),) = re.findall(r"```python\n([^`]*)```\n+```text\n([^`]*)```", DOCS)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(program, {})
    assert output.getvalue() == printed


def test_recipes_and_docs_say_the_same_of_the_size_of_feedback_matrices():
    """The comments of the six blank cells quote the printed table."""
    ((_, printed),) = re.findall(r"```python\n([^`]*)```\n+```text\n([^`]*)```", DOCS)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    for (row, column), storage in STORAGE.items():
        name = name_of(row, column)
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        _, _, dfa, dense, _, channel = rows[column.replace("_", "-")]
        assert f" {dfa if row == 'DFA' else dense} entries" in text, name
        assert (f" {channel} entries" in text) == (storage == "channel"), name
        assert yaml.safe_load(text)["feedback"][0]["feedback"] == storage
