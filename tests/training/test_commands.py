from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fahooks.plugins import Failed, InputError
from fahooks.recipe import find, load, shipped_names
from fahooks.training import commands, loop, setup
from fahooks.training.loop import Result
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare

SMALL = ("data.limit=120", "train.epochs=1", "train.threads=1", "train.device=cpu")


def test_start_trains_and_ends_with_one_line(in_tmp: Path):
    line = commands.start("quickstart", SMALL)
    status = RunDirectory(in_tmp / "runs" / "quickstart-1").read_status()
    assert line.startswith(f"quickstart: test error {status['result']['test_error']:.2f} %, best epoch 1")
    assert line.endswith("in runs/quickstart-1")


def test_a_finished_run_has_a_plot_of_itself(in_tmp: Path):
    commands.start("quickstart", (*SMALL, "probes.every=1"), Path("a"))
    assert Path("a/plots.png").read_bytes().startswith(b"\x89PNG")
    commands.start("quickstart", (*SMALL, "probes.every=null"), Path("b"))
    assert Path("a/plots.png").stat().st_size > Path("b/plots.png").stat().st_size > 5_000


def test_automatic_choices_are_recorded_with_their_reason(in_tmp: Path):
    for name, loader, expected in (("a", "auto", ["data.loader"]), ("b", "memory", [])):
        commands.start("quickstart", (*SMALL, f"data.loader={loader}"), Path(name))
        choices = json.loads(Path(f"{name}/env.json").read_text())["choices"]
        assert list(choices) == expected
        assert all(reason.startswith("memory: ") for reason in choices.values())


def test_nothing_is_written_when_something_is_wrong_beforehand(in_tmp: Path):
    for overrides in (
        ("data.validation=100000",),
        ("data.dataset=mnist", "data.download=false", f"data.root={in_tmp}"),
        ("seed=x",),
        ("model={name: torchvision/resnet18}",),
        ("feedback=[{match: '*', rule: dfa, output: 1}]",),
    ):
        with pytest.raises(InputError):
            commands.start("quickstart", overrides)
    with pytest.raises(InputError):
        commands.quickstart(("data.validation=100000",))
    assert list(in_tmp.iterdir()) == []


def test_a_run_that_another_process_trains_is_left_to_it(in_tmp: Path):
    commands.start("quickstart", SMALL, Path("a"))
    run = RunDirectory(Path("a"))
    run.status("interrupted")
    before = run.metrics.read_bytes()
    with run.alone(), pytest.raises(InputError, match="another process is training in 'a': wait for it, or stop it"):
        commands.resume(Path("a"))
    assert run.metrics.read_bytes() == before
    commands.resume(Path("a"))
    assert run.read_status()["state"] == "finished"


def test_resolved_runs_again_to_the_same_result(in_tmp: Path):
    commands.start("quickstart", SMALL, Path("a"))
    commands.start("a/resolved.yaml", (), Path("b"))
    assert Path("a/best.safetensors").read_bytes() == Path("b/best.safetensors").read_bytes()


def test_an_interrupted_run_says_how_to_go_on(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^stopped; go on with `fahooks train --resume a`"):
        commands.start("quickstart", SMALL, Path("a"))
    monkeypatch.undo()
    assert commands.resume(Path("a")).startswith("quickstart: test error")
    files = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    assert commands.resume(Path("a")).endswith("in a: finished, there is nothing to do")
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == files


def test_auto_begins_goes_on_and_has_nothing_to_do(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    for out, place in ((None, "runs/quickstart-1"), (Path("a"), "a")):
        monkeypatch.setattr(loop, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt, match=place):
            commands.resume_newest("quickstart", SMALL, out)
        monkeypatch.undo()
        before = RunDirectory(Path(place)).rows("probe")
        assert commands.resume_newest("quickstart", SMALL, out).endswith(f"in {place}")
        assert RunDirectory(Path(place)).rows("probe") == before
        again = commands.resume_newest("quickstart", SMALL, out)
        assert again.endswith(f"in {place}: finished, there is nothing to do")
    assert commands.resume_newest("quickstart", (*SMALL, "seed=1")).endswith("in runs/quickstart-2")


def test_auto_records_what_keeps_a_run_from_going_on(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    run = interrupted(Path("a"))

    def no_room(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(setup.models, "build_for_images", no_room)
    with pytest.raises(Failed, match="^out of memory: free some, then give the same command again"):
        commands.resume_newest("quickstart", SMALL, Path("a"))
    assert run.read_status()["state"] == "failed"
    assert run.read_status()["reason"].startswith("out of memory")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model={name: torchvision/resnet18}", "begun with another recipe"),
        ("feedback=[{match: '*', rule: dfa, output: 1}]", "begun with another recipe"),
        ("data.augment=[{crop: {size: 99}}]", "does not fit into images of 8x8"),
        ("data.validation=100000", "data.limit: must be more than"),
    ],
)
def test_a_command_that_starts_nothing_changes_nothing(in_tmp: Path, override: str, message: str):
    run = interrupted(Path("a"))
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file() and path != run.lock}
    with pytest.raises(InputError, match=message):
        commands.resume_newest("quickstart", (*SMALL, override), Path("a"))
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file() and path != run.lock} == before


def interrupted(path: Path) -> RunDirectory:
    """A run that was stopped before its first step."""
    run = RunDirectory.create(prepare(load("quickstart", SMALL)).recipe, find("quickstart"), out=path)
    run.status("interrupted")
    return run


def test_a_finished_run_without_a_result_is_one_line(in_tmp: Path):
    run = interrupted(Path("a"))
    run.status("finished")
    for go_on in (lambda: commands.resume(Path("a")), lambda: commands.resume_newest("quickstart", SMALL, Path("a"))):
        with pytest.raises(InputError, match="says that it is finished, and not with what result: remove it"):
            go_on()


def test_auto_refuses_a_changed_recipe_and_says_what_changed(in_tmp: Path):
    commands.start("quickstart", SMALL, Path("a"))
    RunDirectory(Path("a")).status("interrupted")
    with pytest.raises(InputError) as caught:
        commands.resume_newest("quickstart", (*SMALL, "optim.lr=0.1", "train.threads=2"), Path("a"))
    assert str(caught.value).splitlines() == [
        "the run in 'a' was begun with another recipe (before -> now):",
        "  optim.lr: 0.0005 -> 0.1",
        "  train.threads: 1 -> 2",
        "put the recipe back, or start a new run, in another folder and without --resume",
    ]
    # What has no part in the result may change.
    commands.resume_newest("quickstart", (*SMALL, "checkpoint.keep=3", f"data.root={in_tmp}"), Path("a"))
    assert load("a/resolved.yaml").checkpoint.keep == 3


def test_quickstart_runs_each_rule_from_the_same_weights(in_tmp: Path, capsys: pytest.CaptureFixture[str]):
    folder = commands.quickstart(SMALL)
    assert folder == Path("runs/quickstart-1")
    assert sorted(p.name for p in folder.iterdir()) == ["bp", "fa", "usf_sn"]
    assert "digits: 1,797 real handwritten digits, 8x8, that scikit-learn ships" in capsys.readouterr().out
    for rule in commands.QUICKSTART_RULES:
        recipe = load(str(folder / rule / "resolved.yaml"))
        assert (recipe.name, [f.rule for f in recipe.feedback]) == (f"quickstart/{rule}", [rule])
        assert RunDirectory(folder / rule).read_status()["state"] == "finished"
    losses = [RunDirectory(folder / rule).rows("epoch")[0]["train_loss"] for rule in commands.QUICKSTART_RULES]
    assert len(set(losses)) == 3


def test_quickstart_sets_the_rules_itself(in_tmp: Path):
    with pytest.raises(InputError, match=r"quickstart compares bp, fa, usf_sn and sets feedback and name itself"):
        commands.quickstart(("feedback.0.rule=fa",))


def test_quickstart_fits_real_mnist(data_root: Path):
    made = prepare(load("quickstart", (*SMALL, "data.dataset=mnist", f"data.root={data_root}", "data.download=false")))
    assert (made.train.images, made.test.images) == (96, 10_000)
    assert made.model(next(iter(made.train)).images).shape == (50, 10)


def test_the_final_line_has_test_error_paper_epoch_time_and_place():
    result = Result(test_error=1.234, best_epoch=7, validation_error=1.5, final_test_error=2.0, seconds=125.4)
    line = commands.final_line(load("mnist/fa"), result, RunDirectory(Path("runs/x")))
    assert line == ("mnist/fa: test error 1.23 % (paper: 1.1 %), best epoch 7 (validation error 1.50 %), 2 min 5 s, in runs/x")


@pytest.mark.filterwarnings("ignore::fahooks.data.decoding.CorruptFileWarning")
@pytest.mark.parametrize("loader", ["memory", "torchvision"])
def test_a_run_leaves_a_list_of_the_images_that_it_skipped(
    damaged: tuple[str, ...], loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those too that only a sitting before met."""
    changes = (*SMALL, *damaged, "data.batch_size=2", f"data.loader={loader}")
    run, taken = RunDirectory(tmp_path / "run"), []
    take_step = loop.take_step

    def stopped(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 4:
            signal.raise_signal(signal.SIGTERM)
        return take_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "take_step", stopped)
        commands.start("quickstart", changes, run.path)
    assert run.skipped, "the next sitting may not meet the same images"
    line = commands.resume(run.path)
    assert line.endswith(f"in {run.path}; 5 of its images can not be decoded: see skipped.txt there")
    assert commands.resume(run.path) == f"{line}: finished, there is nothing to do"
    splits, said = zip(*(text.split(": ", 1) for text in run.skipped), strict=True)
    assert set(splits) == {"train", "validation", "test"} and run.skipped == sorted(run.skipped)
    found = [re.search(r"/(\d+)[.]png can not be decoded .*: replace or remove it$", text) for text in said]
    assert sorted(int(match[1]) for match in found if match) == [0, 8, 16, 24, 32]


def test_a_run_that_skips_nothing_leaves_no_list(in_tmp: Path):
    commands.start("quickstart", (*SMALL, "data.corrupt=skip"), Path("a"))
    assert not Path("a/skipped.txt").exists()


def test_the_final_line_has_no_number_of_the_paper_where_it_left_the_cell_blank():
    result = Result(test_error=1.234, best_epoch=7, validation_error=1.5, final_test_error=2.0, seconds=125.4)
    line = commands.final_line(load("mnist/fa", ("paper.error=null",)), result, RunDirectory(Path("runs/x")))
    assert line.startswith("mnist/fa: test error 1.23 %, best epoch 7 ")


def test_the_final_line_has_no_number_of_the_paper_where_the_images_are_others():
    result = Result(test_error=1.234, best_epoch=7, validation_error=1.5, final_test_error=2.0, seconds=125.4)
    line = commands.final_line(load("mnist/fa", ("data.dataset=fashion_mnist",)), result, RunDirectory(Path("runs/x")))
    assert line.startswith("mnist/fa: test error 1.23 %, best epoch 7 ")
    for name in shipped_names():
        recipe = load(name)
        if recipe.paper is not None and recipe.paper.error is not None:
            assert "(paper: " in commands.final_line(recipe, result, RunDirectory(Path("runs/x"))), name


def test_a_run_stopped_after_the_last_of_its_steps_only_validates(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    few = (*SMALL, "train.epochs=9", "train.max_steps=5", "data.batch_size=32")
    commands.start("quickstart", few, Path("whole"))
    evaluate, calls = loop.evaluate, []

    def stop_in_the_second_epoch(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 2:
            raise loop.Stopped
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 5, which is saved"):
            commands.start("quickstart", few, Path("stopped"))
    commands.resume(Path("stopped"))
    rows = [[(row["epoch"], row["step"]) for row in RunDirectory(Path(name)).rows("epoch")] for name in ("whole", "stopped")]
    assert rows == [[(1, 3), (2, 5)]] * 2
    assert Path("whole/best.safetensors").read_bytes() == Path("stopped/best.safetensors").read_bytes()
