"""Recipes as hostile input: whatever a file or `--set` says ends in one line a fault; nothing runs, nothing is written."""

from __future__ import annotations

import os
import re
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fahooks import plugins
from fahooks.cli import main
from fahooks.recipe import RecipeError, Source, load, reading, tree
from fahooks.recipe.loading import MAX_PROBLEMS
from fahooks.training.fitting import load_fitting

GOOD = {
    "name": "small/run",
    "summary": "words",
    "model": "{name: paper/mnist, init: fan_in}",
    "feedback": '[{match: output, rule: bp}, {match: "*", rule: fa, gain: 0.5}]',
    "hooks": "[{name: freeze_signs, after: 0.1}, {name: alignment, strength: 0.1}]",
    "data": "{dataset: digits, root: somewhere, batch_size: 50, validation: 0.1, augment: [{crop: {padding: 2}}, {flip: {}}]}",
    "optim": "{name: sgd, lr: 1e-3, momentum: 0.9}",
    "schedule": "{name: step, every: 2, gamma: 0.1}",
    "train": "{epochs: 3}",
    "probes": "{every: 5}",
    "seed": "3",
}
TEXT = "".join(f"{key}: {value}\n" for key, value in GOOD.items())

# What runs, if a loader lets it, leaves a file.
RUNS = [
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [ran]]",
    "!!python/object/apply:os.mkdir [ran]",
    "!!python/object/new:os.mkdir [ran]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/object:fractions.Fraction {}",
]
SCALARS = [
    *RUNS,
    *(
        "~",
        "''",
        "null",
        "yes",
        "true",
        "0",
        "-1",
        "1",
        "0.5",
        "-0.0",
        "1e-400",
        "1e400",
        ".nan",
        "-.inf",
        "1:59:59",
        "0b1",
        "0o7",
    ),
    *("9" * 30, "9" * 5000, "0x" + "f" * 5000, "0x7fffffffffffffff", "9223372036854775808", "1e9999999", "1" + ":59" * 500),
    *(
        "!!int ''",
        "!!int x",
        "!!float ''",
        "!!float x",
        "!!bool x",
        "!!null x",
        "!!binary aGk=",
        "!!binary '\xe9'",
        "!!str {a: b}",
    ),
    *("2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00", "!!timestamp x", "!!set {a, b}", "!!set {[a]: b}", "!mine x"),
    *(
        "!!omap [{a: 1}]",
        "!!pairs [{a: 1}]",
        "!!map [a]",
        "!!seq {a: b}",
        "!!merge x",
        "<<",
        "=",
        "&a x",
        "&a [*a]",
        "&b {c: *b}",
    ),
    *('"\\ud800"', '"\\0"', '"\\e[31m"', '"a\\nb"', '"\\u202e"', "'a\n\n  b'", "x" * 5000, '"' + "\\x07" * 300 + '"'),
    *("../../../../etc/passwd", "~root", "/dev/zero", "evil.py:run", "timm/x", "torchvision/"),
]
BROKEN = [
    "*a",
    "%x",
    "@x",
    "`x",
    "\t",
    "---",
    "...",
    "? x",
    "|\n  a\n",
    "{",
    "[",
    '"',
    "#",
    ": ",
    "- ",
    "\0",
    "\ufeff",
    "\r",
    "\u2028",
]
KEYS = sorted(
    {*re.findall(r"\w+", TEXT), "base", "<<", "=", "threads", "paper", "table", "!!binary aGk=", "? [a]", '"\\ud800"', '"a\\nb"'}
)


def _list(children: list[str]) -> str:
    return f"[{', '.join(children)}]"


def _mapping(pairs: list[tuple[str, str]]) -> str:
    return f"{{{', '.join(f'{key}: {value}' for key, value in pairs)}}}"


quoted = st.text(max_size=20).map(lambda text: yaml.safe_dump(text, default_style='"', width=10**6).strip())
scalars = st.sampled_from(SCALARS) | st.sampled_from(SCALARS) | quoted | st.integers().map(str) | st.floats().map(str)
keys = st.sampled_from(KEYS) | scalars
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4).map(_list) | st.lists(st.tuples(keys, inner), max_size=4).map(_mapping),
    max_leaves=8,
)


@st.composite
def options(draw: st.DrawFn) -> tuple[str, str]:
    """A section that names something registered, with some of its options set to trees."""
    section, key, registry = draw(
        st.sampled_from([
            ("feedback", "rule", plugins.rules),
            ("hooks", "name", plugins.hooks),
            ("model", "name", plugins.models),
            ("augment", "", plugins.augmentations),
        ])
    )  # fmt: skip
    entry = draw(st.sampled_from(list(registry)))
    names = draw(st.lists(st.sampled_from([*entry.options, "match", "name"]), unique=True, max_size=3))
    given = [(name, draw(trees | scalars)) for name in names]
    if section == "augment":
        data = GOOD["data"].partition("augment")[0]
        return "data", f"{data}augment: [{{{entry.name}: {_mapping(given)}}}]}}"
    one = _mapping([(key, entry.name), *given])
    return section, one if section == "model" else f"[{one}]"


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """The good recipe with sections replaced by trees, single values in it replaced, or bits of its text."""
    sections = dict(GOOD)
    for key in draw(st.lists(st.sampled_from(list(GOOD)), max_size=2)):
        values = list(re.finditer(r"(?<=[ \[{])[\w./*\"-]+(?=[,}\]])", sections[key]))
        if values and draw(st.booleans()):
            value = draw(st.sampled_from(values))
            sections[key] = sections[key][: value.start()] + draw(trees) + sections[key][value.end() :]
        else:
            sections[key] = draw(trees)
    sections |= draw(st.lists(options(), max_size=2))
    for key in draw(st.sampled_from([[], draw(st.lists(keys, max_size=2))])):
        sections[key] = draw(trees)
    text = "".join(f"{key}: {value}\n" for key, value in sections.items())
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.text(max_size=3) | st.sampled_from(BROKEN)) + text[place + draw(st.integers(0, 3)) :]
    return text


dotted = st.lists(st.sampled_from(KEYS) | st.text(max_size=3) | st.sampled_from(["0", "1", "7", "9" * 5000, "-1"]), max_size=5)
overrides = st.builds(lambda key, value: f"{'.'.join(key)}={value}", dotted, trees) | st.text(max_size=30)

# What no recipe may lead to while it is read. Imports are: the first timm/NAME brings timm in.
FORBIDDEN = re.compile(
    r"os\.(system|exec|posix_spawn|fork|mkdir|remove|rename|rmdir|link|symlink|truncate|chmod)|subprocess|socket"
)
met: list[str] = []
watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and (FORBIDDEN.match(event) or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3)):
        met.append(f"{event} {arguments}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[None]:
    """Fail if anything in the block writes, connects or starts a process; stop it where it hangs."""
    global watching
    met.clear()

    def hang(*_: object) -> None:
        raise TimeoutError("reading a recipe hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    watching = True
    try:
        yield
    finally:
        watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert met == []


def judge(text: str, changes: list[str]) -> None:
    """Read `text`: it is refused in lines that can be printed, or is a recipe that can be written and read back."""
    with watched():
        try:
            recipe = load(Source("r.yaml", text), changes)
        except RecipeError as error:
            lines = error.problems
        else:
            assert load(Source("again.yaml", recipe.as_yaml())) == recipe
            return
    assert lines and len(lines) <= MAX_PROBLEMS + 1
    for line in lines:
        assert re.match(r"r\.yaml:\d+: .|--set: .|and \d+ more", line), line
        assert line.isprintable() and len(line) <= 1000, line


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def fuzz(examples: int, *phases: Phase) -> None:
    @settings(max_examples=examples, phases=phases, derandomize=True, database=None, suppress_health_check=SLOW)
    @given(recipes(), st.lists(overrides, max_size=2))
    def run(text: str, changes: list[str]) -> None:
        judge(text, changes)

    run()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the test in it; what is imported for the first model of timm and torchvision is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no model is named"):
        load(Source("r.yaml", TEXT.replace("paper/mnist", "paper/mnits")))
    return tmp_path


def test_whatever_a_recipe_says_ends_in_lines_that_can_be_printed(in_tmp: Path):
    load(Source("r.yaml", TEXT))
    fuzz(400, *Phase)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("constructs", "ran"),  # a loader that constructs what tags name
        ("unprintable", "isprintable"),  # lines as strangers wrote them
        ("numbers", "KeyError|IndexError|AttributeError"),  # PyYAML trusted to raise what it says
    ],
)
def test_the_fuzz_finds_a_planted_fault(fault: str, message: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    if fault == "constructs":
        monkeypatch.setattr(reading, "_Loader", yaml.UnsafeLoader)
        monkeypatch.setattr(reading, "_scalar", lambda loader, node: loader.construct_object(node, deep=True))
    elif fault == "unprintable":
        monkeypatch.setattr(tree, "printable", str)
    else:
        monkeypatch.setattr(reading, "_scalar", lambda loader, node: loader.construct_object(node))
    with pytest.raises(BaseException) as caught:
        fuzz(400, Phase.generate)
    assert re.search(message, f"{caught.type} {caught.value}")


def _bomb(levels: int, opening: str, item: str, closing: str) -> str:
    """Billion laughs: ten aliases of ten aliases of ..."""
    lines = [f"a0: &a0 {opening}{', '.join([item.format('x')] * 10)}{closing}"]
    lines += [f"a{n}: &a{n} {opening}{', '.join([item.format(f'*a{n - 1}')] * 10)}{closing}" for n in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "laughs": _bomb(9, "[", "{}", "]"),
    "laughs in pairs": _bomb(9, "!!pairs [", "k: {}", "]"),
    "laughs in an ordered map": _bomb(9, "!!omap [", "k: {}", "]"),
    "laughs in merges": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)),
    "itself": "a: &a {b: *a}",
    "lists": "a: " + "[" * 90_000,
    "closed lists": "a: " + "[" * 300 + "]" * 300,
    "mappings": "a: " + "{b: " * 20_000,
    "nested blocks": "\n".join(" " * n + "a:" for n in range(300)),
    "sequences": "- " * 40_000,
    "keys": "".join(f"k{n}: 1\n" for n in range(4_900)),
    "sections": TEXT + "".join(f"k{n}: {{a: 1}}\n" for n in range(2_400)),
    "layers": TEXT.replace(GOOD["feedback"], "[" + ", ".join(f"{{match: 'l{n}', rule: fa}}" for n in range(1_600)) + "]"),
    "wrong layers": TEXT.replace(GOOD["feedback"], "[" + ", ".join(["{rule: bpp, gian: x}"] * 1_600) + "]"),
    "a long string, often": f"a: &a {'x' * 50_000}\nb: [{', '.join(['*a'] * 4_000)}]",
    "a long key": f"{'k' * 900}: 1\n? {'k' * 90_000}\n: 1",
    "a long number": f"seed: {'9' * 90_000}",
    "a long hexadecimal number": f"seed: 0x{'f' * 90_000}",
    "a long time of day": f"seed: 1{':59' * 30_000}",
    "a long alias": f"a: *{'x' * 90_000}",
    "anchors": "a: [" + ", ".join(f"&a{n} x" for n in range(9_000)) + "]",
    "quotes": '"' * 90_000,
    "questions": "? " * 40_000,
    "directives": "%TAG ! x\n" * 9_000,
    "too long": "# " + "x" * reading.MAX_BYTES,
    "zeros": "\0" * 10_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_grows_when_it_is_read_costs_little(bomb: str, in_tmp: Path):
    load(Source("r.yaml", TEXT))
    tracemalloc.start()
    try:
        judge(BOMBS[bomb], [])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize(
    "change",
    [f"{'a.' * 5_000}a=1", f"feedback.{'9' * 5_000}.rule=fa", f"seed=0x{'f' * 5_000}", f"name={'[' * 5_000}", "=", ""],
    ids=["long key", "large index", "large number", "deep", "no key", "nothing"],
)
def test_what_grows_behind_set_costs_little_too(change: str, in_tmp: Path):
    judge(TEXT, [change])


def _make(kind: str, path: Path) -> None:
    """Make a file that is no recipe."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to /dev/zero":
        path.symlink_to("/dev/zero")
    elif kind == "bases":
        for n in range(500):
            path.with_name(f"{n}.yaml").write_text(f"base: {n + 1}.yaml\n")
        path.write_text("base: 0.yaml\n")
    else:
        path.write_bytes(FILES[kind])


FILES = {
    "10 MB": b"a: [" + b"1, " * 3_500_000,
    "not UTF-8": b"name: \xff\xfe\n",
    "UTF-16": "name: x\n".encode("utf-16"),
    "NUL bytes": b"name: \0\n",
    "empty": b"",
    "base of a device": b"base: /dev/zero\n",
    "base of a NUL byte": b'base: "x\\0y"\n',
    "base of itself": b"base: r.yaml\n",
    "base of a list": b"base: [r.yaml]\n",
    "base of a binary": f"base: {sys.executable}\n".encode(),
}
PLACES = [
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/proc/self/environ",
    "~nobody-here",
    "x\0y",
    "\ud800",
    "\x1b[31m",
    "a" * 5000,
    "a\nb",
]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to itself", "link to /dev/zero", "bases", *FILES])
@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_file_that_is_no_recipe_is_refused_with_exit_2_and_nothing_is_written(kind: str, command: str, in_tmp: Path):
    _make(kind, in_tmp / "r.yaml")
    _refused(command, "r.yaml", in_tmp)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ascii(place[:20]))
@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_place_that_is_no_recipe_is_refused_with_exit_2_and_nothing_is_written(place: str, command: str, in_tmp: Path):
    _refused(command, place, in_tmp)


def _refused(command: str, name: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with watched():
        done = CliRunner().invoke(main, [command, name])
    assert done.exit_code == 2, done.output
    assert all(line.isprintable() and len(line) < 2000 for line in done.output.splitlines())
    assert len(done.stdout.splitlines()) == (command == "validate")
    assert sorted(folder.rglob("*")) == before


FAULTS = {
    **{name: text for name, text in BOMBS.items() if len(text) <= reading.MAX_BYTES},
    **{f"tag {tag.split()[0]}": TEXT.replace("words", tag) for tag in RUNS},
    "the same key twice": TEXT + "seed: 3\nseed: 4\n",
    "the same key twice, far inside": TEXT.replace("{every: 5}", "{every: 5, every: 6}"),
    "many faults": TEXT.replace("sgd, lr: 1e-3", "sgd, lr: x, learning_rate: 3").replace("{epochs: 3}", "{epochs: -1}"),
    "one fault": TEXT.replace("0.9", "-1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_ends_with_exit_2_and_a_line_for_each_fault(fault: str, in_tmp: Path):
    (in_tmp / "r.yaml").write_text(FAULTS[fault])
    with watched():
        done = CliRunner().invoke(main, ["train", "r.yaml"])
    assert (done.exit_code, done.stdout) == (2, ""), done.exception
    with pytest.raises(RecipeError) as caught:
        load_fitting(Source("r.yaml", FAULTS[fault]))
    assert done.stderr.splitlines() == [f"fahooks: {caught.value.problems[0]}", *caught.value.problems[1:]]
    assert [path.name for path in in_tmp.iterdir()] == ["r.yaml"]


def test_whatever_a_recipe_says_the_command_refuses_it_or_finds_it_right(in_tmp: Path):
    outcomes = set[int]()

    @settings(max_examples=100, derandomize=True, database=None, suppress_health_check=SLOW, deadline=None)
    @given(recipes())
    def run(text: str) -> None:
        (in_tmp / "r.yaml").write_bytes(text.encode(errors="surrogatepass"))
        with watched():
            done = CliRunner().invoke(main, ["validate", "r.yaml"])
        outcomes.add(done.exit_code)
        assert isinstance(done.exception, SystemExit | None), done.exception
        if done.exit_code == 0:
            assert done.output == "r.yaml: ok\n"
        else:
            assert (done.exit_code, done.stderr) == (2, "fahooks: the recipe is wrong\n")
            for line in done.stdout.splitlines():
                assert line.isprintable() and len(line) <= 1000
                assert re.match(r"r\.yaml:\d+: .|recipe 'r.yaml' can not|and \d+ more", line)

    CliRunner().invoke(main, ["validate", "mnist/fa"])  # imports what is imported once
    run()
    assert outcomes == {0, 2}
    assert sorted(path.name for path in in_tmp.iterdir()) == ["r.yaml"]


def test_all_faults_come_in_a_hundred_lines():
    with pytest.raises(RecipeError) as caught:
        load(Source("r.yaml", BOMBS["keys"]))
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert re.fullmatch(r"and \d+ more", caught.value.problems[-1])


def test_what_a_model_starts_from_is_not_read_from_files(in_tmp: Path):
    with pytest.raises(RecipeError, match=r"r.yaml:3: model.checkpoint_path: weights start at random; a recipe reads none"):
        load(Source("r.yaml", TEXT.replace("paper/mnist, init: fan_in", "timm/resnet18, checkpoint_path: evil.pth")))
