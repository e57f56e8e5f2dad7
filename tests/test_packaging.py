from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from tests.conftest import Installed

ROOT = Path(__file__).resolve().parent.parent
# The folder of the checkout -> the package that it is installed as.
HOMES = {"fahooks": "fahooks", "cli": "fahooks/cli", "recipes": "fahooks/recipes"}

in_environment = pytest.mark.xdist_group("installed")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@in_environment
def test_the_wheel_holds_every_module_and_recipe_and_nothing_else(installed: Installed):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in HOMES.items()
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }
    packed = {name for name in ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"fahooks/cli/ls.py", "fahooks/rules/base.py", "fahooks/recipes/mnist/fa.yaml"} <= packed


@in_environment
def test_the_wheel_is_what_runs(installed: Installed):
    program = "import fahooks, fahooks.cli; print(fahooks.__file__); print(fahooks.cli.__file__)"
    printed = installed.run("python", "-c", program).stdout.splitlines()
    home = installed.bin.parent
    assert [Path(line).relative_to(home).parts[-3:] for line in printed] == [
        ("site-packages", "fahooks", "__init__.py"),
        ("fahooks", "cli", "__init__.py"),
    ]


@in_environment
@pytest.mark.parametrize("name", ["cli", "recipes", "tests"])
def test_the_wheel_claims_no_other_top_level_name(installed: Installed, name: str):
    assert installed.run("python", "-c", f"import {name}").returncode == 1


@in_environment
def test_ls_rules_works_outside_the_checkout(installed: Installed):
    done = installed.run("fahooks", "ls", "rules")
    assert done.returncode == 0, done.stderr
    assert "usf_sn" in done.stdout


@in_environment
def test_ls_recipes_works_outside_the_checkout(installed: Installed):
    done = installed.run("fahooks", "ls", "recipes")
    assert done.returncode == 0, done.stderr
    for recipe in ("mnist/bp", "mnist/fa", "mnist/fa-usf-init", "mnist/fa-usf-sn"):
        assert recipe in done.stdout


@in_environment
def test_convert_works_outside_the_checkout(installed: Installed):
    done = installed.run("fahooks", "convert", "paper/mnist", "--rule", "usf_sn")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conv1" in done.stdout and "usf_sn" in done.stdout


@in_environment
def test_an_unknown_rule_is_one_line_outside_the_checkout(installed: Installed):
    done = installed.run("fahooks", "convert", "paper/mnist", "--rule", "usf_ns")
    assert done.returncode == 2
    assert done.stderr.startswith("fahooks: ") and done.stderr.count("\n") == 1
    assert "'usf_sn'" in done.stderr


def test_the_tests_run_on_an_editable_install(tmp_path: Path):
    program = """
import json, sys
from importlib import import_module
from importlib.metadata import distribution
origin = json.loads(distribution("fahooks").read_text("direct_url.json"))
print(json.dumps([origin["dir_info"], [import_module(name).__file__ for name in sys.argv[1:]]]))
"""
    command = [sys.executable, "-c", program, "fahooks", "fahooks.cli", "fahooks.recipes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    origin, files = json.loads(done.stdout)
    assert origin == {"editable": True}
    assert [Path(file).parent for file in files] == [ROOT / folder for folder in HOMES]


def test_every_package_is_listed(project: dict[str, Any]):
    folders = {path.parent.relative_to(ROOT).as_posix() for folder in HOMES for path in (ROOT / folder).rglob("__init__.py")}
    listed = project["tool"]["setuptools"]
    assert sorted(listed["package-dir"].get(name, name.replace(".", "/")) for name in listed["packages"]) == sorted(folders)


def test_every_direct_dependency_is_pinned_and_no_pin_has_an_address(project: dict[str, Any]):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {requirement.name: requirement for requirement in map(Requirement, lines)}
    direct = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    assert {canonicalize_name(Requirement(line).name) for line in direct} <= set(pins)
    for line, pin in zip(lines, pins.values(), strict=True):
        assert pin.url is None
        assert line == f"{pin.name}{pin.specifier}" and str(pin.specifier).startswith("==")


def test_the_pins_are_what_the_tests_run_with():
    # Platform builds such as 2.6.0+cpu carry a local part that the pin leaves open.
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(("torch==", "timm==", "torchvision==", "pydantic==", "click==")):
            name, pin = line.split("==")
            assert distribution(name).version.partition("+")[0] == pin
