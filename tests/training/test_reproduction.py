from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fahooks.plugins import InputError
from fahooks.recipe import shipped_names
from fahooks.report import table1
from fahooks.training import loop, reproduction
from fahooks.training.reproduction import reproduce

DATA = ("data.dataset=digits", "data.limit=60", "data.validation=0.2", "data.batch_size=24")
TINY = (*DATA, "train.epochs=2", "train.device=cpu", "train.threads=1", "probes.every=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with the finished runs of bp and fa."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert reproduce(["mnist"], ["bp", "fa"], overrides=TINY, out=out) == []
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for a test to change."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def again(out: Path, *rows: str, seeds: tuple[int, ...] = (0,), overrides: tuple[str, ...] = TINY) -> list[str]:
    return reproduce(["mnist"], rows or ("bp", "fa"), seeds, overrides, out)


def run_directory(out: Path, row: str = "fa") -> Path:
    return out / "mnist" / row / "seed-0"


def state(path: Path) -> str:
    return json.loads((path / "status.json").read_text())["state"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the resolved recipe of a run."""
    recipe = yaml.safe_load((path / "resolved.yaml").read_text())
    edit(recipe)
    (path / "resolved.yaml").write_text(yaml.safe_dump(recipe))


def test_each_cell_has_a_run_directory_that_says_what_was_asked(trained: Path):
    for row in ("bp", "fa"):
        path = run_directory(trained, row)
        assert state(path) == "finished"
        assert json.loads((path / "env.json").read_text())["overrides"] == [*TINY, "seed=0"]
        resolved = yaml.safe_load((path / "resolved.yaml").read_text())
        assert (resolved["name"], resolved["seed"], resolved["train"]["epochs"]) == (f"mnist/{row}", 0, 2)
    assert [cell.recipe for cell in table1.read(trained)] == ["mnist/bp", "mnist/fa"]


def test_what_is_finished_is_not_trained_again(out: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(out)
    assert again(out) == []
    assert capsys.readouterr().out == f"{out}: 2 runs, 2 of them finished, 0 to train\n"
    assert contents(out) == before


def test_only_what_is_missing_is_trained(out: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(run_directory(out))
    before = contents(out / "mnist" / "bp")
    again(out)
    printed = capsys.readouterr().out
    assert "2 runs, 1 of them finished, 1 to train\n1 of 1: mnist/fa, seed 0: begins\n" in printed
    assert "mnist/fa: test error" in printed.splitlines()[-1]
    assert contents(out / "mnist" / "bp") == before
    assert_same_end(out, trained)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    out: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(run_directory(out))
    evaluate, calls = loop.evaluate, []

    def stop_in_the_second_epoch(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt, match="^stopped; the same command goes on from there$"):
            again(out)
    assert state(run_directory(out)) == "interrupted"
    capsys.readouterr()
    again(out)
    printed = capsys.readouterr().out
    assert "1 of 1: mnist/fa, seed 0: goes on\ngoes on after step " in printed and "epoch 1/2" not in printed
    assert_same_end(out, trained)


@pytest.mark.parametrize(
    "left", [{"recipe.yaml"}, {"recipe.yaml", "resolved.yaml.partial"}, {"recipe.yaml", "resolved.yaml"}, set()]
)
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(out: Path, trained: Path, left: set[str]):
    path = run_directory(out)
    (path / "resolved.yaml.partial").write_text("nam")
    shutil.rmtree(path / "tb")
    shutil.rmtree(path / "checkpoints")
    for file in path.iterdir():
        if file.name not in left:
            file.unlink()
    again(out)
    assert_same_end(out, trained)
    assert not (path / "resolved.yaml.partial").exists()


def test_a_failed_run_goes_on(out: Path, trained: Path):
    (run_directory(out) / "status.json").write_text('{"state": "failed"}')
    again(out)
    assert_same_end(out, trained)


def assert_same_end(out: Path, trained: Path) -> None:
    here, there = (run_directory(folder) for folder in (out, trained))
    results = [json.loads((path / "status.json").read_text())["result"] for path in (here, there)]
    results = [{key: value for key, value in result.items() if key != "seconds"} for result in results]
    assert results[0] == results[1]
    assert (here / "best.safetensors").read_bytes() == (there / "best.safetensors").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_recipe_is_refused_with_what_differs(out: Path, finished: bool):
    if not finished:
        (run_directory(out) / "status.json").write_text('{"state": "interrupted"}')
    before = contents(out)
    with pytest.raises(InputError) as caught:
        again(out, "fa", overrides=(*TINY, "train.epochs=1", "feedback.0.gain=0.5"))
    assert str(caught.value) == (
        f"the run in {str(run_directory(out))!r} was made with another recipe (before -> now):\n"
        "  feedback.0.gain: 1.0 -> 0.5\n  train.epochs: 2 -> 1\nname another --out"
    )
    assert contents(out) == before


def test_another_dataset_is_named_too(out: Path):
    change(run_directory(out), lambda recipe: recipe["data"].update(dataset="mnist"))
    with pytest.raises(InputError, match="  data.dataset: 'mnist' -> 'digits'\n"):
        again(out)


def test_what_has_no_part_in_the_result_makes_no_other_run(out: Path):
    change(run_directory(out), lambda recipe: recipe.update(summary="as it was"))
    assert again(out, "fa", overrides=(*TINY, "summary=as it is", "train.distributed=fsdp2")) == []


def test_a_section_that_is_not_there_is_nothing(out: Path):
    change(run_directory(out), lambda recipe: recipe.update(schedule={"name": "constant"}))
    with pytest.raises(InputError, match="  schedule.name: 'constant' -> 'step'\n  schedule.every: nothing -> 20\n"):
        again(out)


def test_the_seeds_of_a_cell_have_one_recipe(out: Path):
    with pytest.raises(InputError, match="fa/seed-0' was made with another recipe .*\n  train.epochs: 2 -> 1"):
        again(out, "fa", seeds=(5,), overrides=(*TINY, "train.epochs=1"))
    assert not (out / "mnist" / "fa" / "seed-5").exists()
    run_directory(out).rename(out / "mnist" / "fa" / "seed-3")
    with pytest.raises(InputError, match="fa/seed-3' was made with another recipe .*\n  seed: 0 -> 3"):
        again(out, "fa", seeds=(3,))


def test_where_the_data_lie_makes_no_other_run(out: Path):
    change(run_directory(out), lambda recipe: recipe["data"].update(root="/elsewhere"))
    assert again(out) == []


def test_a_key_that_an_older_run_does_not_have_counts_with_its_default(out: Path):
    def forget(recipe: dict[str, Any]) -> None:
        del recipe["probes"], recipe["feedback"][0]["gain"], recipe["optim"]["betas"]

    change(run_directory(out), forget)
    assert again(out) == []
    with pytest.raises(InputError, match="  feedback.0.gain: 1.0 -> 2.0\n"):
        again(out, "fa", overrides=(*TINY, "feedback.0.gain=2.0"))


def test_a_recipe_that_can_not_be_read_any_more_is_named(out: Path):
    change(run_directory(out), lambda recipe: recipe.update(trian={}))
    with pytest.raises(InputError, match=r"the run in .*fa/seed-0' can not go on: .*trian: unknown key.*; name another --out"):
        again(out)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_run_is_left_alone(out: Path, kind: str):
    path = run_directory(out)
    shutil.rmtree(path)
    if kind == "folder":
        path.mkdir()
    file = path / "mine.txt" if kind == "folder" else path
    file.write_text("mine")
    with pytest.raises(InputError, match="fa/seed-0' is in the way of a run, and is none"):
        again(out)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trian.epochs=1",), "trian: unknown key"),
        (("seed=1",), r"seeds from --seeds \(got --set seed=1\)"),
        (("paper.error=0",), r"takes name and paper from its recipes .*\(got --set paper.error=0\)"),
        (("data.dataset=mnist", "data.root=nowhere", "data.download=false"), "^mnist is not at nowhere/.* --columns than mnist$"),
        (("data.validation=100000",), "100000"),
        (("model={name: torchvision/resnet18}",), "resnet18"),
    ],
)
def test_nothing_is_written_when_something_is_wrong_beforehand(in_tmp: Path, overrides: tuple[str, ...], message: str):
    with pytest.raises(InputError, match=message):
        reproduce(["mnist"], ["bp", "fa"], overrides=(*TINY, *overrides))
    assert list(in_tmp.iterdir()) == []


def test_a_file_is_no_folder_for_runs(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out '.*file/below' can not be written, since '.*file' can not"):
        again(tmp_path / "file" / "below")


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path: Path):
    first, second = again(tmp_path, overrides=(*TINY, "optim.lr=1e30"))
    assert first.startswith("mnist/bp, seed 0: the loss was ") and second.startswith("mnist/fa, seed 0: the loss was ")
    assert {state(run_directory(tmp_path, row)) for row in ("bp", "fa")} == {"failed"}


def test_a_run_that_another_process_has_is_left_to_it(out: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(run_directory(out))
    run_directory(out).mkdir()
    with (run_directory(out) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert again(out) == []
        assert "1 of 1: mnist/fa, seed 0: another process has it" in capsys.readouterr().out
        assert [file.name for file in run_directory(out).iterdir()] == [".lock"]
    again(out)
    assert state(run_directory(out)) == "finished"


def test_cells_are_chosen_by_either_name_in_the_papers_order():
    chosen = reproduction.choose(["mnist"], ["FA-uSF SN", "fa-usf-init", "fa", "bp", "Fa"])
    assert [entry.name for entry in chosen] == ["mnist/bp", "mnist/fa", "mnist/fa-usf-init", "mnist/fa-usf-sn"]
    assert [entry.row for entry in chosen] == ["BP", "FA", "FA-uSF Init.", "FA-uSF SN"]
    everything = [entry.name for entry in reproduction.choose([], [])]
    assert set(everything) == {name for name in shipped_names() if name != "quickstart"}
    assert [entry.name for entry in reproduction.choose(["mnist"], [])] == [name for name in everything if name[:6] == "mnist/"]


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (["minst"], [], "Table 1 has no column 'minst' - did you mean 'mnist'?; there are mnist"),
        ([], ["bp-nose"], "Table 1 has no row 'bp-nose' - did you mean 'bp-noise'"),
        ([], ["BP + Noize"], "Table 1 has no row 'BP + Noize' - did you mean 'BP + Noise'"),
        ([""], [], "Table 1 has no column ''; there are mnist"),
    ],
)
def test_what_the_table_does_not_have_is_refused(columns: list[str], rows: list[str], message: str):
    with pytest.raises(InputError) as caught:
        reproduction.choose(columns, rows)
    assert str(caught.value).startswith(message)


def cell(recipe: str, seeds: tuple[int, ...] = (0,), overrides: tuple[str, ...] = ()) -> table1.Cell:
    errors = table1.Errors(1.0, None, False)
    return table1.Cell("", "", recipe, errors, errors, None, (1,), seeds, overrides)


def test_the_command_makes_just_these_cells():
    mnist = [cell(entry.name) for entry in reproduction.choose(["mnist"], [])]
    assert reproduction.command(mnist) == "fahooks reproduce table1 --columns mnist"
    some = [cell("mnist/bp", (0, 1), ("train.epochs=1", "hooks=[]")), cell("mnist/fa", (0, 1), ("train.epochs=1", "hooks=[]"))]
    assert reproduction.command(some, Path("my runs")) == (
        "fahooks reproduce table1 --columns mnist --rows bp,fa --seeds 0,1 --set train.epochs=1 --set 'hooks=[]' --out 'my runs'"
    )
    first, second = reproduction.command([cell("mnist/bp"), cell("mnist/fa", (3,)), cell("mnist/fa-usf-sn")]).split(" && ")
    assert first == "fahooks reproduce table1 --columns mnist --rows bp,fa-usf-sn"
    assert second == "fahooks reproduce table1 --columns mnist --rows fa --seeds 3"


def test_two_processes_fill_one_folder(tmp_path: Path):
    settings = [word for override in TINY for word in ("--set", override)]
    words = ["reproduce", "table1", "--columns", "mnist", "--rows", "bp", *settings, "--out", "out"]
    command = [sys.executable, "-m", "fahooks", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out = tmp_path / "out"
    try:
        again(out, "fa")
        reproduction.write_table(out)
        _, errors = other.communicate(timeout=900)
    finally:
        other.kill()
        other.communicate()
    assert (other.returncode, errors) == (0, "")
    lines = (out / "table1.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith(("| BP", "| FA"))] == ["mnist/bp", "mnist/fa"]
    assert shlex.split(lines[-1])[:7] == ["fahooks", "reproduce", "table1", "--columns", "mnist", "--rows", "bp,fa"]
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["mnist", "table1.csv", "table1.md"]


def test_of_nothing_finished_there_is_no_table(tmp_path: Path):
    assert reproduction.write_table(tmp_path) == []
    assert not (tmp_path / "table1.md").exists()


def test_the_table_waits_for_another_process_that_writes_it(out: Path):
    with (out / ".table1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writing = threading.Thread(target=reproduction.write_table, args=[out])
        writing.start()
        writing.join(0.2)
        assert writing.is_alive() and not (out / "table1.md").exists()
    writing.join(60)
    assert (out / "table1.md").exists()
