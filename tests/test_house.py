"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import fahooks
from fahooks import plugins

ROOT = Path(__file__).resolve().parent.parent

# Imports go one way: functional <- rules <- surgery <- adapters, auditing, hooks, probes <- training <- cli.
# data, recipe and plugins know nothing of surgery; report knows only run directories, and the recipe in each.
# Part -> the parts that it may import.
MAY_IMPORT = {
    "plugins": set(),
    "terminal": set(),
    "functional": set(),
    "observation": set(),
    "reference": {"functional"},
    "models": {"plugins"},
    "data": {"plugins", "terminal"},
    "recipe": {"plugins", "models", "data"},
    "report": {"plugins", "recipe"},
    "diagnosis": {"plugins", "data"},
    "rules": {"functional", "plugins"},
    "surgery": {"rules", "functional", "plugins"},
}
ABOVE_SURGERY = {"surgery", "rules", "functional", "plugins"}
MAY_IMPORT |= {part: ABOVE_SURGERY | {"observation"} for part in ("adapters", "auditing", "hooks", "probes")}
MAY_IMPORT["verify"] = ABOVE_SURGERY | {"observation", "auditing"}
MAY_IMPORT["benchmark"] = ABOVE_SURGERY | {"hooks"}
MAY_IMPORT["training"] = set(MAY_IMPORT) - {"reference"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"reference"}
MAY_IMPORT["__main__"] = {"cli", "training"}

# A module whose tests bear the name of what it is about instead of its own.
TESTED_BY = {"adapters.py": "test_attention.py"}


def modules() -> Iterator[tuple[Path, Path]]:
    """Every module of the package: its file, and its path within the package (cli/ls.py for fahooks.cli.ls)."""
    for folder, inside in (("fahooks", ""), ("cli", "cli")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file, inside / file.relative_to(ROOT / folder)


def imported_parts(source: str, package: str) -> set[str]:
    """The parts of fahooks that a module of `package` imports, inside functions too: surgery for fahooks.surgery."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("fahooks.")}


def test_imports_go_one_way():
    wrong: list[str] = []
    for file, module in modules():
        part = module.parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in MAY_IMPORT, f"{file} belongs to no part that this test knows: say what it may import"
        package = ".".join(["fahooks", *module.parts[:-1]])
        imported = imported_parts(file.read_text(), package) - {part}
        wrong += [f"{module} imports fahooks.{other}" for other in sorted(imported - MAY_IMPORT[part])]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import fahooks.surgery", {"surgery"}),
        ("from fahooks.surgery import convert", {"surgery"}),
        ("from fahooks import surgery, plugins", {"surgery", "plugins"}),
        ("def f():\n    from fahooks.hooks.dale import Dale", {"hooks"}),
        ("from ..surgery import convert", {"surgery"}),
        ("from .. import surgery", {"surgery"}),
        ("from . import base", {"rules"}),
        ("import torch\nfrom collections import abc", set()),
    ],
)
def test_the_search_for_imports_finds_them(source: str, parts: set[str]):
    assert imported_parts(source, "fahooks.rules") == parts


def imported_by(program: str) -> set[str]:
    """The top-level modules that a fresh process has after `program`."""
    program = f"import sys\n{program}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_fahooks_is_light():
    heavy = {"timm", "torchvision", "numba", "matplotlib", "pydantic", "sklearn", "tensorboard", "rich", "click"}
    first = imported_by("import fahooks\nfrom fahooks import plugins")
    assert "fahooks" in first and not first & {"torch", *heavy}
    used = imported_by("from fahooks import *\nimport fahooks\nassert convert is fahooks.convert")
    assert "torch" in used and not used & heavy
    assert "torch" in imported_by("import fahooks\nassert fahooks.rules.Rule and fahooks.plugins and fahooks.functional.linear")


def test_the_package_itself_only_re_exports():
    tree = ast.parse((ROOT / "fahooks" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert imports == block.body
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    said = {alias.name: f"{node.module}" for node in imports for alias in node.names}
    assert said == {name: f"fahooks.{home}" for home, names in fahooks._HOMES.items() for name in names.split()}
    assert not any(isinstance(node, ast.FunctionDef) and not node.name.startswith("__") for node in tree.body)


def test_a_public_name_is_no_module():
    """An import of the module would put it where the name is."""
    for name in fahooks.__all__:
        assert not inspect.ismodule(getattr(fahooks, name)), name
        assert find_spec(f"fahooks.{name}") is None, name
    with pytest.raises(AttributeError, match="module 'fahooks' has no attribute 'converted'"):
        _ = fahooks.converted  # pyright: ignore[reportAttributeAccessIssue]


def test_every_module_has_a_test_file_in_its_place():
    """tests/data/test_split.py for fahooks/data/split.py; or one file for a whole folder, tests/test_data.py."""
    missing = []
    for _, module in modules():
        own = module.with_name(f"test_{module.name}")
        places = [TESTED_BY.get(module.as_posix(), own), f"test_{module.parts[0]}.py"]
        if not module.name.startswith("__") and not any((ROOT / "tests" / place).is_file() for place in places):
            missing.append(f"tests/{own}")
    assert not missing


def test_every_public_name_has_a_docstring():
    public = {name: getattr(fahooks, name) for name in fahooks.__all__}
    assert "convert" in public
    assert [name for name, thing in public.items() if not inspect.getdoc(thing)] == []


def test_the_readme_lists_every_rule_and_hook_with_its_options():
    rows = {
        cells[1].strip(" `"): cells[3]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) == 6
    }
    registered = {entry.name: entry.options for registry in (plugins.rules, plugins.hooks) for entry in registry}
    assert {name: ", ".join(f"`{option}`" for option in options) for name, options in registered.items()} == {
        name: options.strip() for name, options in rows.items()
    }
