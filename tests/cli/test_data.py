from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fahooks.cli import main
from fahooks.data import FfcvLoader
from fahooks.data.ffcv import library
from fahooks.training import feeding

MISSING = FfcvLoader.available()
needs_ffcv = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


def data(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["data", *arguments])


@needs_ffcv
def test_prepare_prints_the_files_and_nothing_else_on_standard_output(tmp_path: Path):
    done = data("prepare", "quickstart", "--set", f"data.root={tmp_path}")
    assert done.exit_code == 0
    assert all(Path(line).is_file() for line in done.stdout.splitlines())
    assert done.stderr.splitlines()[0].startswith("wrote digits/train: 1,437 images in ")
    again = data("prepare", "quickstart", "--set", f"data.root={tmp_path}")
    assert (again.stdout, again.stderr) == (done.stdout, "")


def test_prepare_without_ffcv_is_one_line_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "missing", lambda: "the package ffcv is not installed: pip install 'fahooks[ffcv]'")
    done = data("prepare", "quickstart", "--set", f"data.root={tmp_path}")
    assert done.exit_code == 2
    assert done.stderr == (
        "fahooks: data.loader=ffcv does not work here: the package ffcv is not installed: pip install 'fahooks[ffcv]'\n"
    )


@pytest.mark.parametrize("command", ["prepare", "bench"])
def test_sigterm_ends_it_like_ctrl_c_so_that_what_is_half_written_goes(command: str, monkeypatch: pytest.MonkeyPatch):
    ended: list[str] = []

    def stopped(*arguments: object, **options: object) -> None:
        try:
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append(command)

    monkeypatch.setattr(feeding, "prepare_data", stopped)
    monkeypatch.setattr(feeding, "compare_loaders", stopped)
    done = data(command, "quickstart")
    assert (done.exit_code, ended) == (130, [command])
    assert done.stderr.startswith("fahooks: stopped; ")


def test_bench_prints_a_row_a_loader_and_writes_the_numbers(tmp_path: Path):
    file = tmp_path / "numbers.json"
    arguments = ("--loaders", "memory,torchvision", "--rounds", "2", "--seconds", "0", "--json", str(file))
    done = data("bench", "quickstart", *arguments, "--set", f"data.root={tmp_path}")
    assert done.exit_code == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["loader", "images/s", "slowest-fastest"]
    assert [row.split()[0] for row in rows] == ["memory", "torchvision"]
    document = json.loads(file.read_text())
    assert [len(each["rounds"]["images_per_second"]) for each in document] == [2, 2]


@pytest.mark.parametrize(
    ("names", "problem"),
    [("memroy", "no loader is named 'memroy'"), ("memory,", "--loaders must be names"), ("memory,memory", "has memory twice")],
)
def test_bench_of_a_loader_that_is_none_is_refused(tmp_path: Path, names: str, problem: str):
    done = data("bench", "quickstart", "--loaders", names, "--set", f"data.root={tmp_path}")
    assert done.exit_code == 2 and problem in done.stderr
