from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from fahooks import plugins
from fahooks.cli import COMMANDS, main
from fahooks.cli.ls import KINDS
from fahooks.rules import Rule

ROOT = Path(__file__).resolve().parents[2]


def fahooks(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def table(*arguments: str) -> dict[str, str]:
    """First word of a row -> the row, of a table that was printed into a pipe: tabs between cells, and nothing to fill up."""
    result = fahooks("ls", *arguments)
    assert result.exit_code == 0, result.stderr
    assert all(line == line.rstrip() and "  " not in line for line in result.stdout.splitlines())
    header, *rows = (line.split("\t") for line in result.stdout.splitlines())
    assert header[:2] == ["name", "summary"]
    return {row[0]: "\t".join(row) for row in rows}


def test_rules_describe_themselves():
    rows = table("rules")
    assert list(rows) == plugins.rules.names()
    for entry in plugins.rules:
        assert entry.summary in rows[entry.name]
        assert entry.paper in rows[entry.name]
    assert "scale=None" in rows["usf"]
    assert "scale" not in rows["fa"].split(plugins.rules.get("fa").summary)[1]


def test_a_pattern_keeps_the_names_that_match():
    assert set(table("rules", "usf*")) == {name for name in plugins.rules.names() if name.startswith("usf")}


def test_a_pattern_without_a_match_names_near_misses():
    result = fahooks("ls", "rules", "ufs*")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "'ufs*'" in result.stderr and "'usf'" in result.stderr


def test_recipes_are_those_that_ship():
    shipped = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix(): yaml.safe_load(path.read_text())
        for path in (ROOT / "recipes").rglob("*.yaml")
        if not any(part.startswith("_") for part in path.relative_to(ROOT / "recipes").parts)
    }
    assert "mnist/fa-usf-sn" in shipped
    rows = table("recipes")
    assert set(rows) == set(shipped)
    for name, recipe in shipped.items():
        assert recipe["summary"] in rows[name]
        error = recipe.get("paper", {}).get("error", "")
        assert ("not in the paper" if error is None else str(error)) in rows[name]
    assert "not in the paper" in rows["imagenet-2/dfa"] and "not in the paper" not in rows["imagenet-2/bp"]


def test_models_say_what_else_works():
    result = fahooks("ls", "models")
    assert "paper/mnist" in result.stdout
    for form in ("timm/NAME", "torchvision/NAME", "file.py:factory"):
        assert form in result.stderr


def test_datasets_have_the_options_that_dataset_options_takes():
    rows = table("datasets")
    assert rows["mnist"].split("\t")[2] == ""
    assert rows["imagefolder"].split("\t")[2].startswith("path, size=224")


@pytest.mark.parametrize(
    ("pattern", "found", "absent"),
    [
        ("timm/resnet1*", "timm/resnet18", "torchvision/resnet18"),
        ("torchvision/vit_b*", "torchvision/vit_b_16", "torchvision/vit_l_16"),
        ("paper/*", "paper/mnist", "timm/resnet18"),
        ("*resnet18", "torchvision/resnet18", "timm/resnet34"),
    ],
)
def test_models_are_searched_in_the_libraries(pattern: str, found: str, absent: str):
    names = [line.partition("\t")[0] for line in fahooks("ls", "models", pattern).stdout.splitlines()]
    assert found in names
    assert absent not in names


def test_models_that_a_pattern_finds_have_their_options():
    (head, *rows) = fahooks("ls", "models", "paper/mni*").stdout.splitlines()
    assert head == "name\tsummary\toptions\tpaper"
    (row,) = rows
    assert row.startswith("paper/mnist\t") and "init=fan_in" in row


def test_a_model_that_no_library_has_is_refused():
    result = fahooks("ls", "models", "timm/resnet")
    assert result.exit_code == 2
    assert "'timm/resnet'" in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed(kind: str):
    result = fahooks("ls", kind)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


def test_an_unknown_kind_is_refused_with_near_misses():
    result = fahooks("ls", "rulse")
    assert result.exit_code == 2
    assert result.stderr == (f"fahooks: nothing is listed under 'rulse' - did you mean 'rules'?; there are {', '.join(KINDS)}\n")


def test_brackets_in_a_summary_are_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plugins.rules, "_entries", dict(plugins.rules._entries))
    plugins.rules.register("bracketed", summary="maps [red] to [N, C]")(type("Bracketed", (Rule,), {}))
    assert "maps [red] to [N, C]" in table("rules", "bracketed")["bracketed"]


def test_an_unknown_command_is_refused_with_near_misses():
    result = fahooks("trian")
    assert result.exit_code == 2
    assert result.stderr == "fahooks: no command is named 'trian' - did you mean 'train'?; `fahooks --help` lists all\n"


def test_help_prints_the_line_that_each_command_gives_itself():
    printed = " ".join(fahooks("--help").stdout.split())
    with click.Context(main) as context:
        for name, (_, summary) in COMMANDS.items():
            command = main.get_command(context, name)
            assert command is not None
            assert command.get_short_help_str(limit=1000).rstrip(".") == summary.rstrip(".")
            assert summary in printed


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "rules"]])
def test_what_needs_no_model_imports_no_model_library(arguments: list[str]):
    program = f"""
import sys
from fahooks.cli import main
main({arguments!r}, standalone_mode=False)
heavy = {{"timm", "torchvision", "matplotlib", "sklearn", "tensorboard"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_fahooks_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fahooks", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == fahooks("--version").stdout
    assert done.stdout.startswith("fahooks 0.")
