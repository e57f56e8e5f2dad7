from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fahooks import plugins
from fahooks.plugins import InputError, NameClash, PluginWarning, Registry, UnknownName, near, one_line

if TYPE_CHECKING:
    from tests.conftest import Installed

in_environment = pytest.mark.xdist_group("installed")

DEMO_RULE = """
import fahooks


@fahooks.register_rule("demo_half", paper="Demo et al. 2026")
class DemoHalf(fahooks.Rule):
    '''B = share x W.'''

    def __init__(self, *, share: float = 0.5):
        super().__init__()
        self.share = share

    def forward(self, weight):
        return self.share * weight
"""


@pytest.fixture
def colours() -> Registry:
    registry = Registry("colour", home="fahooks.plugins")

    @registry.register("crimson", paper="Newton 1704")
    def crimson(*, shade: int, gamma: float = 2.2) -> tuple[int, float]:
        """A red.

        More about it.
        """
        return shade, gamma

    @registry.register("azure", summary="a blue")
    def azure() -> str:
        """Not this line."""
        return "blue"

    return registry


def of_package(package: str) -> Callable[[], str]:
    """A target that looks as if `package` had defined it."""

    def target() -> str:
        return package

    target.__module__ = f"{package}.things"
    return target


def test_an_entry_describes_itself(colours: Registry):
    entry = colours.get("crimson")
    assert (entry.kind, entry.name, entry.summary, entry.paper) == ("colour", "crimson", "A red.", "Newton 1704")
    assert entry.package == __name__.partition(".")[0]
    assert entry.options == {"shade": inspect.Parameter.empty, "gamma": 2.2}
    assert colours.get("azure").summary == "a blue"


def test_names_are_sorted_and_iterable(colours: Registry):
    assert colours.names() == ["azure", "crimson"] == [entry.name for entry in colours]
    assert "azure" in colours
    assert "asure" not in colours


def test_register_returns_what_it_decorates():
    assert Registry("colour", home="fahooks.plugins").register("red")(target := of_package("paint")) is target


def test_build_calls_the_target_with_options(colours: Registry):
    assert colours.get("crimson").build(shade=3) == (3, 2.2)
    assert colours.get("crimson").build(shade=3, gamma=1.0) == (3, 1.0)


def test_build_refuses_an_unknown_option_with_near_misses(colours: Registry):
    with pytest.raises(InputError, match=r"^colour 'crimson' has no option 'gama' - did you mean 'gamma'\?$"):
        colours.get("crimson").build(shade=3, gama=1.0)


def test_build_refuses_a_missing_option(colours: Registry):
    with pytest.raises(InputError, match="^colour 'crimson' needs the option 'shade'$"):
        colours.get("crimson").build()


@pytest.mark.parametrize(
    ("shade", "message"),
    [
        ("dark", "colour 'crimson': shade must be an integer (got 'dark')"),
        (True, "colour 'crimson': shade must be an integer (got True)"),
        (1.5, "colour 'crimson': shade must be an integer (got 1.5)"),
        ("x" * 100, f"colour 'crimson': shade must be an integer (got '{'x' * 56}...)"),
    ],
)
def test_build_refuses_a_value_that_is_not_what_the_annotation_says(shade: object, message: str, colours: Registry):
    with pytest.raises(InputError) as refused:
        colours.get("crimson").build(shade=shade)
    assert str(refused.value) == message


def test_a_whole_number_is_a_number_and_a_tuple_a_list():
    def target(*, gain: float, names: str | list[str] | None = None) -> tuple[float, Any]:
        return gain, names

    entry = plugins.describe("colour", "red", target)
    assert entry.build(gain=1, names=("a", "b")) == (1, ("a", "b"))
    with pytest.raises(
        InputError, match=r"names must be a string or a list \(got 3\)|names must be a list or a string \(got 3\)"
    ):
        entry.build(gain=1, names=3)


def test_what_an_annotation_does_not_tell_may_be_anything():
    def unresolved(*, shade: Absent = 1, gamma: float = 2.2) -> Any:  # pyright: ignore[reportUndefinedVariable] # noqa: F821
        return shade, gamma

    def open_ended(*, shade: int = 1, **more: Any) -> Any:
        return shade, more

    assert plugins.describe("colour", "red", unresolved).build(shade="dark") == ("dark", 2.2)
    assert plugins.describe("colour", "red", open_ended).build(shade=2, hue="dark") == (2, {"hue": "dark"})
    with pytest.raises(InputError, match="shade must be an integer"):
        plugins.describe("colour", "red", open_ended).build(shade="dark")


@pytest.mark.parametrize(
    ("registry", "written"),
    [(plugins.rules, "register_rule"), (plugins.adapters, "register_adapter"), (plugins.models, "plugins.models.register")],
)
def test_a_decorator_without_a_name_is_refused_at_once(registry: Registry, written: str):
    before = registry.names()
    with pytest.raises(
        InputError, match=rf"^write @fahooks.{written}\('name'\), with the name that users will type \(got <class"
    ):

        @registry.register  # pyright: ignore[reportArgumentType]
        class Mine:
            """Nothing."""

    assert registry.names() == before


@pytest.mark.parametrize("thing", [int, len, 3, lambda weight: weight], ids=["class", "function", "object", "lambda"])
@pytest.mark.parametrize("registry", [plugins.rules, plugins.hooks], ids=lambda registry: registry.kind)
def test_only_what_can_serve_is_registered(registry: Registry, thing: Any):
    with pytest.raises(
        InputError, match=rf"^{registry.kind} 'odd' must be a subclass of fahooks.{registry.kind.capitalize()}, got "
    ):
        registry.register("odd")(thing)
    with pytest.raises(InputError, match="^colour 'odd': .* has no signature"):
        Registry("colour", home="fahooks.plugins").register("odd")(int if callable(thing) else thing)
    assert "odd" not in registry


def test_an_unknown_name_is_refused_with_near_misses(colours: Registry):
    with pytest.raises(UnknownName) as caught:
        colours.get("azur")
    assert str(caught.value) == "no colour is named 'azur' - did you mean 'azure'?; `fahooks ls colours` lists all"
    with pytest.raises(UnknownName, match="^no colour is named 'zzzzzz'; "):
        colours.get("zzzzzz")


def test_a_clash_names_both_packages():
    registry = Registry("colour", home="fahooks.plugins")
    registry.register("red")(of_package("paint"))
    with pytest.raises(NameClash, match="'red' is registered twice, by the packages 'paint' and 'ink'"):
        registry.register("red")(of_package("ink"))
    assert registry.get("red").package == "paint"


def test_a_clash_within_one_package_is_refused_too():
    registry = Registry("colour", home="fahooks.plugins")
    registry.register("red")(of_package("paint"))
    other = of_package("paint")
    other.__qualname__ = "other"
    with pytest.raises(
        NameClash, match=r"^colour 'red' is registered twice, for paint.things.* and paint.things.other: rename one of them$"
    ):
        registry.register("red")(other)


def test_a_module_that_is_imported_again_may_register_again():
    registry = Registry("colour", home="fahooks.plugins")
    registry.register("red")(of_package("paint"))
    registry.register("red")(again := of_package("paint"))
    assert registry.get("red").target is again


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("usf_ns", " - did you mean 'usf_sn'?"),
        ("sn", " - did you mean 'usf_sn'?"),
        ("FA", " - did you mean 'fa'?"),
        ("weight_mirror", ""),
        ("", ""),
    ],
)
def test_near_names_what_is_close_or_contains(name: str, hint: str):
    assert near(name, ["bp", "fa", "usf_sn"]) == hint


def test_a_name_that_differs_in_case_only_is_named_alone():
    assert near("USF_sn", ["usf_sn", "usf_sn2"]) == " - did you mean 'usf_sn'?"
    assert near("usf_s", ["usf_sn", "usf_sn2"]) == " - did you mean 'usf_sn', 'usf_sn2'?", "control"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Lays an installed distribution NAME with one plugin module of that name and a source on the path until the test ends."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins.rules, "_entries", dict(plugins.rules._entries))
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    names: list[str] = []

    def install(name: str, source: str) -> None:
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[fahooks.plugins]\n{name} = {name}\n")

    yield install
    for name in names:
        sys.modules.pop(name, None)


RULE = """
import fahooks

@fahooks.register_rule({name!r})
class Rule(fahooks.Rule):
    "A rule."
"""


def test_a_broken_plugin_does_not_stop_the_others(install: Callable[[str, str], None]):
    install("first_plugin", RULE.format(name="first"))
    install("broken_plugin", "import a_module_that_is_gone")
    install("ending_plugin", "raise SystemExit('no\\nlicence')")
    install("last_plugin", RULE.format(name="last"))
    with pytest.warns(PluginWarning) as caught:
        names = plugins.rules.names()
    assert {"first", "last", "fa"} <= set(names)
    assert [str(warning.message) for warning in caught] == [
        "plugin 'broken_plugin' of package 'broken_plugin' was skipped: "
        "ModuleNotFoundError: No module named 'a_module_that_is_gone'",
        "plugin 'ending_plugin' of package 'ending_plugin' was skipped: SystemExit: no licence",
    ]
    assert plugins.rules.get("first").package == "first_plugin"


def test_plugins_are_loaded_once(install: Callable[[str, str], None]):
    install("noisy_plugin", "raise RuntimeError('again')")
    with pytest.warns(PluginWarning, match="again"):
        plugins.load_plugins()
    plugins.load_plugins()


def test_a_clashing_plugin_is_an_error_every_time(install: Callable[[str, str], None]):
    install("greedy_plugin", RULE.format(name="fa"))
    for _ in range(2):
        with pytest.raises(NameClash, match="rule 'fa' is registered twice, by the packages 'fahooks' and 'greedy_plugin'"):
            plugins.rules.names()


@pytest.fixture
def plugin(installed: Installed, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Installs the package fahooks-demo-plugin, whose one module has the given source, until the test ends."""

    def install(source: str) -> None:
        (tmp_path / "fahooks_demo_plugin.py").write_text(source)
        (tmp_path / "pyproject.toml").write_text("""
[project]
name = "fahooks-demo-plugin"
version = "1"

[project.entry-points."fahooks.plugins"]
demo = "fahooks_demo_plugin"

[tool.setuptools]
py-modules = ["fahooks_demo_plugin"]
""")
        installed.install("--no-deps", "--no-cache", tmp_path)

    yield install
    installed.uninstall("fahooks-demo-plugin")


@in_environment
def test_an_installed_plugin_adds_a_rule_that_converts(installed: Installed, plugin: Callable[[str], None]):
    arguments = ["convert", "paper/mnist", "--rule", "demo_half", "--option", "share=0.25"]
    before = installed.run("fahooks", *arguments)
    assert before.returncode == 2
    assert "no rule is named 'demo_half'" in before.stderr

    plugin(DEMO_RULE)
    after = installed.run("fahooks", *arguments)
    assert after.returncode == 0, after.stdout + after.stderr
    assert "demo_half" in after.stdout
    listed = installed.run("fahooks", "ls", "rules").stdout
    (row,) = [line for line in listed.splitlines() if line.startswith("demo_half")]
    for cell in ("B = share x W.", "share=0.5", "Demo et al. 2026"):
        assert cell in row


@in_environment
def test_a_broken_plugin_is_named_and_skipped(installed: Installed, plugin: Callable[[str], None]):
    plugin("raise RuntimeError('half installed')")
    done = installed.run("fahooks", "ls", "rules")
    assert done.returncode == 0
    assert "usf_sn" in done.stdout
    assert done.stderr == (
        "fahooks: warning: plugin 'demo' of package 'fahooks-demo-plugin' was skipped: RuntimeError: half installed\n"
    )


@in_environment
def test_a_plugin_that_takes_a_name_is_an_error_naming_both_packages(installed: Installed, plugin: Callable[[str], None]):
    plugin(DEMO_RULE.replace("demo_half", "usf_sn"))
    for arguments in (["ls", "rules"], ["convert", "paper/mnist", "--rule", "usf_sn"]):
        done = installed.run("fahooks", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("fahooks: rule 'usf_sn' is registered twice") and done.stderr.count("\n") == 1
        assert "'fahooks'" in done.stderr and "'fahooks_demo_plugin'" in done.stderr


def test_an_error_in_one_line_has_its_class_and_its_words() -> None:
    assert one_line(ValueError("no\n such\tname")) == "ValueError: no such name"
    assert one_line(AssertionError()) == "AssertionError"
