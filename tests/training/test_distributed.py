"""`fahooks train` in two processes, started by torchrun, beside one."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from fahooks.plugins import InputError
from fahooks.training import checkpoint
from fahooks.training.distributed import with_sync_batchnorm
from fahooks.training.evaluation import evaluate_run

HERE = Path(__file__).parent

RECIPE = (HERE / "float64.yaml").read_text()

SHARED = ["bp", "fa", "usf", "usf_init", "usf_sn", "frsf", "brsf", "dfa", "dense_fa", "drtp"]
HOOKS = ["constant_norm", "dale", "freeze_signs, after: 3", "manhattan", "alignment"]
OPTIONS = ["train.accumulate=3", "train.clip_norm=0.5", "train.label_smoothing=0.1", "train.ema=0.9"]

LONG = ["train.epochs=3", "train.ema=0.9", "checkpoint.every=1", "checkpoint.keep=100"]

# A compiled run of several processes is compared with one of one process that is not compiled.
MIXED = "feedback=[{match: blocks.1.0, rule: dfa}, {match: blocks.2.1, rule: kp}, {rule: usf_sn}]"
COMPILED = [MIXED, "data.batch_size=32", "data.limit=101", "train.epochs=1"]

# A fifth of the images can not be decoded, and in some batches more of those of one process than of the other.
FOLDER = "dataset: imagefolder, dataset_options: {path: images, size: 8, channels: 1, test: 0.2}"
FILES = f"data={{{FOLDER}, batch_size: 33, validation: 21, corrupt: skip}}"
SKIPPED = [FILES, "feedback=[{match: blocks.1.0, rule: drtp}, {rule: fa}]", "train.accumulate=2"]

ALONE = {
    **{f"rule {rule}": [f"feedback=[{{rule: {rule}}}]"] for rule in [*SHARED, "kp", "wm"]},
    **{f"hook {hook}": [f"hooks=[{{name: {hook}}}]"] for hook in HOOKS},
    **{f"options {rule}": [*OPTIONS, f"feedback=[{{rule: {rule}}}]"] for rule in ("usf_sn", "drtp")},
    "adamw": ["optim={name: adamw, lr: 1e-3}", "schedule={name: cosine, warmup: 1}"],
    "probes": ["probes.every=2"],
    "fp16": ["train.precision=fp16", "model.overflow=true", "hooks=[{name: constant_norm}]", "feedback=[{rule: kp}]"],
    "sync_batchnorm": ["train.sync_batchnorm=true", "model.norm=true"],
    "channels_last": ["train.channels_last=true"],
    "compiled": COMPILED,
    "long": LONG,
    "skipped": SKIPPED,
}
DDP = {**ALONE, "compiled": [*COMPILED, "train.compile=true"]}
# The gradients of the other rules are compared in tests/test_distributed.py.
FEW = {name: overrides for name, overrides in DDP.items() if name not in ("rule bp", "rule usf", "rule usf_init", "rule frsf")}
FSDP2 = {name: [*overrides, "train.distributed=fsdp2"] for name, overrides in FEW.items()}

# One worker trains them all: another would train them once more.
of_trained = pytest.mark.xdist_group("trained in two processes")


def torchrun(*arguments: str | Path, restarts: int = 0, processes: int = 2) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, "--max-restarts", str(restarts), *map(str, arguments)]


def call(command: Sequence[str | Path], *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the runs of one process, of two by DDP, and of two by FSDP2."""
    place = tmp_path_factory.mktemp("trained")
    (place / "r.yaml").write_text(RECIPE)
    write_images(place / "images")
    folders = {}
    for name, cases in (("alone", ALONE), ("ddp", DDP), ("fsdp2", FSDP2)):
        folders[name] = place / name
        folders[name].mkdir()
        here = {**cases, "skipped": [*cases["skipped"], f"data.root={place}"]}
        (place / f"{name}.json").write_text(json.dumps(here))
        arguments = [HERE / "in_float64.py", place / "r.yaml", place / f"{name}.json", folders[name]]
        done = call([sys.executable, *arguments] if name == "alone" else torchrun(*arguments))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "skipped: " in done.stderr and "lr_scheduler" not in done.stderr, done.stderr
    return folders


def write_images(folder: Path) -> None:
    """Digits as files, a folder for each class; every fifth is cut off."""
    for number, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if number == 150:
            break
        file = folder / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * pixels).reshape(8, 8).astype("uint8")).save(file)
        if number % 5 == 0:
            file.write_bytes(file.read_bytes()[:60])


def parts(run: Path) -> dict[str, Any]:
    """What the last checkpoint has of model, optimizer, hooks and average, as tensors by name."""
    newest = max((run / "checkpoints").glob("*.pt"))
    state = checkpoint.read(newest)["parts"]
    return {name: state[name] for name in ("model", "optimizer", "hooks", "average") if name in state}


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, Tensor):
        assert type(ours) is Tensor, where
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m: f"{where}: {m}")
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            if key == "fused":  # steps of sharded parameters are not
                continue
            assert_same(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(value, other, f"{where}.{number}")
    else:
        assert ours == theirs, where


def assert_same_rows(ours: Path, theirs: Path) -> None:
    """What is logged is the same; evaluation computes losses in float32."""
    assert len(rows(ours)) == len(rows(theirs))
    for row, other in zip(rows(ours), rows(theirs), strict=True):
        assert row.keys() == other.keys() and row["kind"] == other["kind"]
        for key, value in row.items():
            if not isinstance(value, str):
                assert value == pytest.approx(other[key], rel=1e-10 if isinstance(value, dict) else 1e-5), key


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in lines]


@of_trained
@pytest.mark.parametrize("case", [case for case in DDP if case != "sync_batchnorm"])
def test_two_processes_by_ddp_train_as_one(trained: dict[str, Path], case: str) -> None:
    one, two = trained["alone"] / case, trained["ddp"] / case
    assert_same(parts(two), parts(one), case)
    assert_same_rows(two, one)
    assert (two / "status.json").read_text().count('"finished"') == 1
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


@of_trained
@pytest.mark.parametrize("case", [case for case in FSDP2 if case != "sync_batchnorm"])
def test_two_processes_by_fsdp2_train_as_one_and_their_checkpoints_are_whole(trained: dict[str, Path], case: str) -> None:
    assert_same(parts(trained["fsdp2"] / case), parts(trained["alone"] / case), case)
    assert_same_rows(trained["fsdp2"] / case, trained["alone"] / case)


TOGETHER = """
import sys
from fahooks.cli import main
from fahooks.training import distributed, loop

loop._plot = lambda run: None
options = [f"--set={option}" for option in OPTIONS]
with distributed.joined():
    main(["quickstart", *options, "--out=quickstart"], standalone_mode=False)
    for weights in ("best", "last"):
        main(["eval", "quickstart/fa", f"--weights={weights}", "--json"], standalone_mode=False)
"""


def test_quickstart_and_eval_share_their_work_among_the_processes(tmp_path: Path, in_tmp: Path) -> None:
    options = ["data.limit=120", "train.epochs=2", "train.device=cpu", "train.threads=1"]
    (tmp_path / "together.py").write_text(TOGETHER.replace("OPTIONS", repr(options)))
    done = call(torchrun(tmp_path / "together.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nusf_sn: ") == done.stdout.count("figure quickstart/quickstart.png") == 1, done.stdout
    documents = re.findall(r"^{.*?^}", done.stdout, re.DOTALL | re.MULTILINE)
    assert len(documents) == 2
    for weights, document in zip(("best", "last"), documents, strict=True):
        alone = evaluate_run(tmp_path / "quickstart" / "fa", weights).as_dict()
        for name in ("validation", "test"):
            assert json.loads(document)[name] == pytest.approx(alone[name], rel=1e-5)


@of_trained
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_synchronised_batch_norm_is_refused_on_cpus_and_needless_alone(trained: dict[str, Path], way: str) -> None:
    said = (trained[way] / "sync_batchnorm.txt").read_text()
    assert said == (
        "train.sync_batchnorm=true: torch has nn.SyncBatchNorm on GPUs alone, and this runs on the CPU: leave it away"
    )
    assert not (trained[way] / "sync_batchnorm").exists()
    assert "test error" in (trained["alone"] / "sync_batchnorm.txt").read_text()


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def test_batch_norms_are_replaced_by_synchronised_ones_with_the_same_weights_and_activations() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), BatchNormAct2d(4), nn.Flatten())
    for tensor in (*layers.parameters(), *layers.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    next(layers.parameters()).data.sub_(1.25)
    plain, model = layers.eval(), with_sync_batchnorm(copy.deepcopy(layers))
    assert [type(layer).__name__ for layer in model.children()] == ["Conv2d", "SyncBatchNorm", "SyncBatchNormAct", "Flatten"]
    assert plain.state_dict().keys() == model.state_dict().keys()
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model.eval()(images), plain(images), rtol=0, atol=0)
    assert (plain(images) >= 0).all() and (plain[:2](images) < 0).any(), "control: there is an activation to lose"
    with pytest.raises(InputError, match="'0' is a OwnBatchNorm, for which there is no synchronised one: leave it away"):
        with_sync_batchnorm(nn.Sequential(OwnBatchNorm(4)))


@of_trained
def test_the_rules_differ(trained: dict[str, Path]) -> None:
    """Control: what is compared depends on the rule, and the weights moved."""
    fa, bp = (parts(trained["ddp"] / f"rule {rule}")["model"]["blocks.0.0.weight"] for rule in ("fa", "bp"))
    first = checkpoint.read(min((trained["ddp"] / "rule fa" / "checkpoints").glob("*.pt")))
    assert not torch.allclose(fa, bp, rtol=1e-3)
    assert first["progress"]["step"] == 8
    assert len(rows(trained["ddp"] / "rule fa")) == 4


RUN = """\
name: run
model: {name: paper/mnist}
feedback: [{match: "*", rule: kp}]
data: {dataset: digits, batch_size: 33, validation: 21, limit: 321}
optim: {name: adam, lr: 1e-3}
train: {epochs: 3, device: cpu, threads: 1}
checkpoint: {every: 4}
seed: 0
"""


@of_trained
@pytest.mark.parametrize(("begun", "processes"), [("fsdp2", 1), ("alone", 2)])
def test_another_number_of_processes_goes_on_with_a_run(
    trained: dict[str, Path], tmp_path: Path, begun: str, processes: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[begun] / "long", run)
    for path in sorted((run / "checkpoints").glob("*.pt"))[7:]:  # as if it had been killed after six steps
        path.unlink()
    (run / "status.json").write_text("{}")
    resolved = run / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("distributed: ddp", "distributed: fsdp2"))
    arguments = [HERE / "in_float64.py", run, "resume", tmp_path]
    done = call([sys.executable, *arguments] if processes == 1 else torchrun(*arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on after step 6, in epoch 2/3" in done.stdout
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert_same(parts(run), parts(trained["alone"] / "long"), begun)


SLOW = """
import sys, time
from datetime import timedelta
from pathlib import Path
from torch.distributed.distributed_c10d import _set_pg_timeout
from fahooks.training import distributed

written = Path(sys.argv[1])
with distributed.joined():
    _set_pg_timeout(timedelta(seconds=2))
    with distributed.rank_0_first():
        if distributed.rank() == 0:
            time.sleep(5)
            written.write_text("")
        assert written.exists()
    assert distributed.of_every_rank(distributed.rank()) == [0, 1]
"""


def test_ranks_wait_for_what_rank_0_prepares_longer_than_for_anything_else(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    done = call(torchrun(tmp_path / "slow.py", tmp_path / "written"))
    assert done.returncode == 0, done.stderr


def test_an_error_on_one_rank_ends_all_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RUN)
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from fahooks.training import loop\n"
        "    def fails(*_): raise RuntimeError('disk on fire')\n"
        "    loop.take_step = fails\n"
    )
    command = torchrun("-m", "fahooks", "train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("fahooks:")]
    assert len(said) == 1 and said[0].startswith("fahooks: RuntimeError: disk on fire; this is a fault of fahooks or a plugin")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["reason"].startswith("RuntimeError: disk on fire")
    assert "in fails" in (tmp_path / "run" / "failure.txt").read_text()


def test_wrong_input_is_said_once(tmp_path: Path) -> None:
    done = call(torchrun("-m", "fahooks", "train", "mnist/fa", "--set", "train.epoch=1"))
    assert done.returncode != 0
    assert done.stderr.count("unknown key") == 1


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_killed_worker_is_started_again_and_the_run_goes_on(tmp_path: Path, way: str) -> None:
    (tmp_path / "r.yaml").write_text(RUN)
    run = tmp_path / "run"
    long = ["--set", "train.epochs=40", "--set", "checkpoint.every=3", "--set", f"train.distributed={way}"]
    command = torchrun("-m", "fahooks", "train", tmp_path / "r.yaml", *long, "--out", run, restarts=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as agent:
        try:
            deadline = time.monotonic() + 120
            while not list((run / "checkpoints").glob("step-0000000[3-9]*.pt")) and time.monotonic() < deadline:
                time.sleep(0.01)
            workers = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
            ranks = {environ_of(pid).get("RANK"): pid for pid in workers}
            os.kill(ranks["1"], signal.SIGKILL)
            assert agent.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        finally:
            agent.terminate()
    assert "goes on after step" in (tmp_path / "log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line[:20]]
    assert epochs == list(range(1, 41))


def test_a_process_whose_other_is_killed_says_so(tmp_path: Path) -> None:
    """Without torchrun's agent, which ends those that are left, and may do so before they notice."""
    (tmp_path / "r.yaml").write_text(RUN)
    (tmp_path / "killed.py").write_text(
        "import os, signal\n"
        "from fahooks.cli import main\n"
        "from fahooks.training import loop\n"
        "def dies(*arguments):\n"
        "    global steps\n"
        "    steps += 1\n"
        "    if steps == 4 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return take_step(*arguments)\n"
        "steps, take_step, loop.take_step = 0, loop.take_step, dies\n"
        "main()\n"
    )
    command = [sys.executable, tmp_path / "killed.py", "train", tmp_path / "r.yaml", "--out", tmp_path / "run"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    ranks = [
        subprocess.Popen(
            [*command, "--set", "checkpoint.every=3"],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said, _ = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL]
    assert "fahooks: another process of this run is gone, maybe killed" in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / "step-000000003.pt").exists()


SERIES = """
import os, signal, sys
from fahooks.cli import main
from fahooks.training import distributed, loop

def dies(*arguments):
    # One of two processes, once, in the middle of the third run.
    if setup_seed(arguments) == 1 and not os.path.exists("died") and os.environ["RANK"] == "1":
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(*arguments)

def setup_seed(arguments):
    return arguments[0].recipe.seed

take_step, loop.take_step = loop.take_step, dies
loop._plot = lambda run: None
sys.argv[0] = "fahooks"
options = ("data.limit=120", "train.epochs=2", "train.device=cpu", "train.threads=1", "probes.every=null")
settings = [f"--set={option}" for option in options]
with distributed.joined():
    main(["train", "quickstart", *settings, "--dry-run"], standalone_mode=False)
    try:
        main(["train", "quickstart", *settings, "--sweep=optim.lr=1.0e+30,1e-3", "--seeds=0,1"], standalone_mode=False)
    except Exception as error:
        if distributed.rank() == 0:
            print("ended with:", error)
    digits = [f"--set={option}" for option in ("data.dataset=digits", "data.validation=20", *options)]
    main(["reproduce", "table1", "--columns=mnist", "--rows=bp", *digits], standalone_mode=False)
"""


def test_a_dry_run_and_series_in_two_processes_where_one_run_diverges_and_one_process_dies(tmp_path: Path) -> None:
    (tmp_path / "series.py").write_text(SERIES)
    command = torchrun(tmp_path / "series.py", restarts=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("speed ") and line.endswith("for each of 2 processes") for line in lines) == 2, "a try each"
    sweep = tmp_path / "runs" / "quickstart-sweep"
    states = {
        (path.parent.name, path.name): json.loads((path / "status.json").read_text())["state"] for path in sweep.glob("*/*")
    }
    assert states == {
        **{("optim.lr=1.0e+30", f"seed-{seed}"): "failed" for seed in (0, 1)},
        **{("optim.lr=1e-3", f"seed-{seed}"): "finished" for seed in (0, 1)},
    }
    assert sum(line.endswith("optim.lr=1e-3, seed 0: begins") for line in lines) == 1, "what is finished is not trained again"
    diverged = "quickstart, optim.lr=1.0e+30, seed 0: the loss was nan"
    assert sum(line.startswith(f"ended with: {diverged}") for line in lines) == 1
    assert "1 of 1: mnist/bp, seed 0: begins" in lines and "another process has it" not in done.stdout, "they train it together"
    assert lines[-1] == "written: runs/table1/table1.csv, runs/table1/table1.md" and lines.count(lines[-1]) == 1


FINISHED = """
import json, os, sys, time
from fahooks.cli import main
from fahooks.training import commands

def dies(*arguments):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        while json.load(open("run/status.json"))["state"] != "finished":
            time.sleep(0.01)
        os._exit(1)
    return final_line(*arguments)

final_line, commands.final_line = commands.final_line, dies
sys.argv[0] = "fahooks"
main(["train", "quickstart", *(f"--set={o}" for o in sys.argv[1:]), "--out", "run"])
"""


def test_processes_that_are_started_again_after_the_run_had_finished_have_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "finished.py").write_text(FINISHED)
    options = ["data.limit=120", "train.epochs=1", "train.device=cpu", "train.threads=1", "probes.every=null"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun(tmp_path / "finished.py", *options, restarts=1)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("quickstart: test error")]
    assert said and said[-1].endswith("run: finished, there is nothing to do")


def environ_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
