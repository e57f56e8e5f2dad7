from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fahooks.cli.arguments import FileToWrite, names, numbers
from fahooks.plugins import InputError

# Runs the command and says which packages it imported.
PROGRAM = """
import sys
from fahooks.cli import main
try:
    main(prog_name="fahooks")
except SystemExit as end:
    print("exit", end.code, file=sys.stderr)
print("imported", *sorted({"torch", "torch._dynamo", "numpy", "timm", "matplotlib"} & set(sys.modules)), file=sys.stderr)
"""


def command(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("bench", "convert", "cp", "data", "doctor", "eval", "ls", "quickstart", "reproduce")),
        *([name, "--help"] for name in ("show", "train", "validate")),
        ["bench", "step", "--help"],
        ["data", "bench", "--help"],
    ],
    ids=" ".join,
)
def test_help_comes_without_torch(arguments: list[str]):
    done = command(*arguments)
    assert done.stderr == "exit 0\nimported\n"
    assert "ahooks" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["trian"], "no command is named 'trian' - did you mean 'train'"),
        (["train", "mnist/fo"], "no recipe is named 'mnist/fo', and there is no such file - did you mean 'mnist/fa'"),
        (["show", "mnist/fo"], "no recipe is named 'mnist/fo'"),
        (["cp", "mnist/fo", "x.yaml"], "no shipped recipe is named 'mnist/fo' - did you mean 'mnist/fa'"),
        (["bench", "loop", "mnist/fo"], "no recipe is named 'mnist/fo'"),
        (["data", "prepare", "mnist/fo"], "no recipe is named 'mnist/fo'"),
        (["validate", "mnist/fo"], "the recipe is wrong"),
        (["train", "mnist/fa", "--ste", "seed=1"], "there is no option --ste - did you mean '--set'"),
        (["ls", "rule"], "nothing is listed under 'rule' - did you mean 'rules'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_misspelt_is_told_without_torch(arguments: list[str], problem: str, tmp_path: Path):
    done = command(*arguments, cwd=tmp_path)
    *line, end, imported = done.stderr.splitlines()
    assert len(line) == 1 and problem.lower() in line[0].lower()
    assert (end, imported) == ("exit 2", "imported")


def test_a_right_name_imports_torch_and_not_its_compiler():
    """The control: what the tests above say that they did not see is seen here."""
    assert command("validate", "mnist/fa").stderr.splitlines()[-1] == "imported numpy torch"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fahooks tr", "plain,train"),
        ("fahooks train mnist/fa-usf-s", "plain,mnist/fa-usf-sn"),
        ("fahooks cp cifar10-2/fa-usf-s", "plain,cifar10-2/fa-usf-sn"),
        ("fahooks ls ru", "plain,rules"),
    ],
)
def test_the_shell_completes_names_without_torch(words: str, offered: str):
    count = str(len(words.split()) - 1)
    done = command(_FAHOOKS_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
    assert offered in done.stdout.splitlines()
    # bash forgets what stands before an item that asks for files.
    assert "file," not in [line.partition(",")[0] + "," for line in done.stdout.splitlines()[1:]]
    assert done.stderr == "exit 0\nimported\n"


@pytest.mark.parametrize("arguments", [["data", "bench", "quickstart"], ["bench", "step", "paper/mnist"]], ids=" ".join)
def test_a_file_that_can_not_be_written_is_told_before_anything_is_measured(arguments: list[str], tmp_path: Path):
    (tmp_path / "file").touch()
    for path, problem in (("gone/x.json", "No such file"), ("file/x.json", "Not a directory"), (".", "is a directory")):
        done = command(*arguments, "--json", path, cwd=tmp_path)
        line, end, imported = done.stderr.splitlines()
        assert repr(path) in line and problem in line
        assert (end, imported) == ("exit 2", "imported")


def test_a_list_has_each_name_once():
    assert names("--rules", "fa, usf") == ["fa", "usf"] and names("--rules", None) == []
    assert numbers("0, 2,1") == [0, 2, 1]
    for text, problem in (
        ("fa,usf,fa", "--rules has fa twice: give it once"),
        ("fa,", "must be names with a comma between them"),
    ):
        with pytest.raises(InputError, match=problem):
            names("--rules", text)
    with pytest.raises(InputError, match="--seeds has 1 twice"):
        numbers("1,01")


def test_a_file_to_write_is_left_alone_until_it_is_written(tmp_path: Path):
    kind, old, new = FileToWrite(), tmp_path / "old", tmp_path / "new"
    old.write_text("before")
    assert (kind.convert(str(old), None, None), kind.convert(str(new), None, None)) == (old, new)
    assert old.read_text() == "before" and not new.exists()


def test_links_and_pipes_to_write_to_are_left_alone(tmp_path: Path):
    kind, link, pipe = FileToWrite(), tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "new")
    os.mkfifo(pipe)
    for path in (link, pipe):
        assert kind.convert(str(path), None, None) == path
    assert link.is_symlink() and not (tmp_path / "new").exists() and pipe.is_fifo()
