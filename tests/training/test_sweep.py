from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fahooks.plugins import InputError
from fahooks.training import commands, loop, streams, sweep
from fahooks.training.run_directory import RunDirectory

TINY = ("data.limit=60", "data.batch_size=24", "train.epochs=2", "train.device=cpu", "train.threads=1", "probes.every=null")
RATES = "optim.lr=1e-3,1e-4"


def planned(
    *sweeps: str, out: Path | None = None, seeds: tuple[int, ...] | None = None, more: tuple[str, ...] = ()
) -> sweep.Sweep:
    return sweep.plan("quickstart", (*TINY, *more), sweeps, seeds, out)


def weights(plan: sweep.Sweep) -> list[bytes]:
    return [(run.path / "best.safetensors").read_bytes() for run in plan.runs]


def test_the_runs_are_the_product_of_all_values_and_seeds():
    plan = planned(RATES, "optim.betas=[0.9, 0.99],[0.5, 0.9]", seeds=(3, 5))
    found = [(run.recipe.seed, run.recipe.optim.lr, run.recipe.optim.model_dump()["betas"]) for run in plan.runs]
    assert found == [(s, lr, betas) for s in (3, 5) for lr in (1e-3, 1e-4) for betas in ((0.9, 0.99), (0.5, 0.9))]
    assert len({run.path for run in plan.runs}) == 8
    assert plan.out == Path("runs/quickstart-sweep")
    assert plan.runs[0].name == "quickstart, optim.lr=1e-3, optim.betas=[0.9, 0.99], seed 3"
    assert all(run.path.name == f"seed-{run.recipe.seed}" and len(run.path.parts) == 4 for run in plan.runs)
    assert planned(RATES).runs[0].path == Path("runs/quickstart-sweep/optim.lr=1e-3/seed-0")
    assert [run.path.name for run in planned(seeds=(0, 1)).runs] == ["seed-0", "seed-1"]
    assert [run.recipe.seed for run in planned(RATES, more=("seed=7",)).runs] == [7, 7]


def test_values_are_told_apart_by_commas_outside_of_brackets():
    assert planned("optim.lr=1e-3, 1e-4").settings == [("optim.lr=1e-3",), ("optim.lr=1e-4",)]
    assert planned("feedback=[{rule: fa}],[{rule: usf, scale: 0.5}]").settings == [
        ("feedback=[{rule: fa}]",),
        ("feedback=[{rule: usf, scale: 0.5}]",),
    ]
    one, other = (sweep._folder(Path(), (f"model.name={name}",)) for name in ("a/b", "a_b"))
    assert one != other and one.name.startswith("model.name=a_b-")


@pytest.mark.parametrize(
    ("sweeps", "seeds", "more", "message"),
    [
        (["optim.lr"], None, (), "must be dotted.key=value,value, such as optim.lr=1e-3,1e-4"),
        (["optim.lr="], None, (), "must be dotted.key=value,value"),
        (["=1"], None, (), "must be dotted.key=value,value"),
        (["seed=1,2"], None, (), "--sweep can not change seed; --seeds does"),
        (["name=a,b"], None, (), "--sweep can not change name"),
        (["optim.lr=1e-3,x"], None, (), "--sweep: optim.lr: must be a number"),
        (["optim.learning_rate=1,2"], (0,), (), "--sweep: optim.learning_rate: unknown key .* did you mean 'lr'"),
        ([RATES], (0,), ("optim.nesterov=x",), "^--set: optim.nesterov"),
        (["optim.lr=]["], None, (), "--sweep optim.lr: not YAML"),
        (["optim.lr=!!python/name:os.system ''"], None, (), "has no values with the tag"),
        (["optim.lr=" + ",".join(map(str, range(1, 1200)))], None, (), "more than 1,000 runs"),
        ([f"a.b{n}={','.join('abcdefghij')}" for n in range(12)], None, (), "more than 1,000 runs"),
        (["optim.lr=1e-3,1e-4,0.001"], None, (), "trains the same twice: optim.lr=1e-3 and optim.lr=0.001 are one recipe"),
        (["optim.lr=1e-3,1e-3"], (0, 1), (), "trains the same twice: optim.lr=1e-3 and optim.lr=1e-3 are one recipe"),
        (
            [RATES, RATES],
            None,
            (),
            "trains the same twice: optim.lr=1e-3, optim.lr=1e-3 and optim.lr=1e-4, optim.lr=1e-3 are one",
        ),
        ([RATES], (0, 1), ("seed=4",), "--seeds says which seeds there are"),
        ([RATES], None, (f"{RATES.partition('=')[0]}=5",), "--sweep says which values optim.lr takes: leave --set optim.lr away"),
    ],
)
def test_what_is_no_sweep_is_refused(sweeps: list[str], seeds: tuple[int, ...] | None, more: tuple[str, ...], message: str):
    with pytest.raises(InputError, match=message):
        planned(*sweeps, seeds=seeds, more=more)


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_bits(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole, stopped = (planned(RATES, out=Path(name), seeds=(0, 1)) for name in ("whole", "stopped"))
    assert sweep.train_missing(whole) == []
    evaluate, calls = loop.evaluate, []

    def stop_in_the_second_run(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 6:
            raise loop.Stopped
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop_in_the_second_run)
        with pytest.raises(KeyboardInterrupt, match="^stopped; the same command goes on from there$"):
            sweep.train_missing(stopped)
    states = [RunDirectory(run.path).read_status().get("state") for run in stopped.runs]
    assert states == ["finished", "interrupted", None, None]
    capsys.readouterr()
    assert sweep.train_missing(stopped) == []
    said = [
        line for line in capsys.readouterr().out.splitlines() if ": goes on" in line or ": begins" in line or "runs" in line[:15]
    ]
    assert said[0] == "stopped: 4 runs, 1 of them finished, 3 to train"
    assert "1 of 3: quickstart, optim.lr=1e-4, seed 0: goes on" in said
    assert weights(stopped) == weights(whole)
    assert len(set(weights(whole))) == 4, "control: settings and seeds make a difference"


def test_images_are_loaded_once_a_sweep_and_opened_once_a_seed(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    calls = {"load": 0, "open_streams": 0}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*arguments, **options)

        return call

    for name in calls:
        monkeypatch.setattr(streams, name, counted(name, getattr(streams, name)))
    plan = planned("optim.lr=1e-3,1e-4,1e-5", seeds=(0, 1))
    assert sweep.train_missing(plan) == []
    assert calls == {"load": 1, "open_streams": 2}
    # A run of its own, with images of its own, ends with the same bits.
    commands.start("quickstart", (*TINY, "optim.lr=1e-4", "seed=1"), Path("alone"))
    assert Path("alone/best.safetensors").read_bytes() == weights(plan)[4]
    calls.update(load=0, open_streams=0)
    assert sweep.train_missing(planned("data.validation=12,10", out=Path("other"))) == []
    assert calls == {"load": 1, "open_streams": 3}, (
        "control: other images are opened anew; the last checked are the first trained on"
    )


def test_what_is_wrong_with_the_last_setting_is_found_before_the_first_run(in_tmp: Path):
    with pytest.raises(InputError, match="does not run on images"):
        sweep.train_missing(planned("model={name: paper/mnist},{name: torchvision/resnet18}"))
    assert list(in_tmp.iterdir()) == []


def test_an_interrupted_run_goes_on_with_the_loader_it_began_with(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate = loop.evaluate

    def stop(*arguments: Any) -> dict[str, Any]:
        raise loop.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep.train_missing(planned("optim.lr=1e-3", more=("data.loader=torchvision",)))
    assert loop.evaluate is evaluate
    # An explicit other loader is refused before anything is done; auto, which would choose memory, goes on.
    with pytest.raises(InputError, match="another recipe .*\n  data.loader: 'torchvision' -> 'memory'\n"):
        sweep.train_missing(planned("optim.lr=1e-3", more=("data.loader=memory",)))
    assert sweep.train_missing(planned("optim.lr=1e-3", more=("data.download=true",))) == []
    (run,) = planned("optim.lr=1e-3").runs
    assert run.finished and run.run.made_from["data"]["loader"] == "torchvision"
    assert sweep.train_missing(planned("optim.lr=1e-3", more=("data.loader=memory",))) == [], "it is finished"


def test_the_directory_of_one_run_is_not_that_of_a_series(in_tmp: Path):
    (in_tmp / "run").mkdir()
    (in_tmp / "run" / "resolved.yaml").write_text("")
    with pytest.raises(InputError, match="--out 'run' is the directory of one run: name another folder for a series"):
        planned(RATES, out=Path("run"))


def test_what_another_recipe_made_is_not_taken(in_tmp: Path):
    sweep.train_missing(planned("optim.lr=1e-3"))
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="seed-0' was made with another recipe .*\n  train.epochs: 2 -> 3\nname another --out"):
        sweep.train_missing(planned("optim.lr=1e-3", more=("train.epochs=3",)))
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
    shutil.rmtree("runs")
    with pytest.raises(InputError, match="mnist is not at"):
        sweep.train_missing(planned("data.dataset=digits,mnist", more=("data.download=false", f"data.root={in_tmp}")))
    assert not Path("runs").exists()
