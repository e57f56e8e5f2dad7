from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fahooks import plugins, recipe
from fahooks.plugins import InputError
from fahooks.recipe import RecipeError, Source, find, load, load_marked
from fahooks.recipe.schema import Feedback
from fahooks.recipe.tree import shown

GOOD = """\
name: small/run
model: {name: paper/mnist, init: fan_in}
feedback:
  - {match: "output", rule: bp}
  - {match: "*", rule: fa, gain: 0.5}
data: {dataset: digits, root: somewhere, batch_size: 50, validation: 0.1}
optim: {name: adam, lr: 1e-3}
schedule: {name: step, every: 2, gamma: 0.1}
train: {epochs: 3}
"""


def source(text: str = GOOD, **replacements: str) -> Source:
    """The good recipe with lines replaced by key; an empty replacement takes the line away."""
    for key, line in replacements.items():
        before = next(candidate for candidate in text.splitlines() if candidate.startswith(f"{key}:"))
        text = text.replace(f"{before}\n", f"{line}\n" if line else "")
    return Source("r.yaml", text)


def problems(of: Source, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(of, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in line for line in caught.value.problems)
    return [line.removeprefix("r.yaml:") for line in caught.value.problems]


def test_a_recipe_becomes_typed_values_with_defaults():
    read = load(source())
    assert read.name == "small/run"
    assert (read.model.name, read.model.options) == ("paper/mnist", {"init": "fan_in"})
    assert [(f.match, f.rule, f.options) for f in read.feedback] == [("output", "bp", {}), ("*", "fa", {"gain": 0.5})]
    assert read.optim == recipe.Adam(name="adam", lr=0.001)
    assert read.schedule == recipe.Step(name="step", every=2, gamma=0.1)
    assert (read.data.loader, read.data.download, read.train.precision, read.probes.every, read.seed) == (
        "auto",
        True,
        "fp32",
        None,
        0,
    )


def test_what_as_yaml_writes_reads_back_as_the_same_recipe():
    read = load(source(optim="optim: {name: adamw, lr: 0.1, betas: [0.8, 0.9]}"))
    assert load(Source("resolved.yaml", read.as_yaml())) == read
    assert yaml.safe_load(read.as_yaml())["data"]["root"] == "somewhere"


def test_defaults_that_could_not_be_read_back_stay_out():
    def plain(*, match: str = "no option: the section's own", a: int = 1, b: object = len, c: float | None = None) -> None: ...

    def forbidden(*, a: float = None, b: int = 2) -> None: ...  # pyright: ignore[reportArgumentType]

    section = Feedback.model_validate({"rule": "x", "a": 5})
    registry = plugins.Registry("rule", home="fahooks.rules")
    for name, target, expected in (("x", plain, {"a": 5, "c": None}), ("y", forbidden, {})):
        registry.register(name)(target)
        given = section if name == "x" else Feedback(rule="y")
        assert recipe.with_defaults(given, registry.get(name)).options == expected


def test_data_lie_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    text = GOOD.replace("root: somewhere, ", "")
    monkeypatch.setenv("FAHOOKS_DATA", "elsewhere")
    assert load(source(text)).data.root == "elsewhere"
    monkeypatch.delenv("FAHOOKS_DATA")
    assert load(source(text)).data.root == "~/data"


@pytest.mark.parametrize(
    ("key", "line", "expected"),
    [
        ("name", "", "1: name: is missing"),
        ("name", "name: ../up", "1: name: must be words of letters, digits, '.', '_' and '-', joined by '/' (got '../up')"),
        ("name", "name: 3", "1: name: must be a string (got 3)"),
        ("name", "nmae: x", "1: nmae: unknown key (got 'x') - did you mean 'name'?"),
        ("model", "model: paper/mnist", "2: model: must be a mapping of keys to values (got 'paper/mnist')"),
        ("model", "model: {init: fan_in}", "2: model.name: is missing"),
        (
            "model",
            "model: {name: paper/mnist, init: fanin}",
            "2: model.init: must be 'fan_in' or 'default' (got 'fanin') - did you mean 'fan_in'?",
        ),
        (
            "model",
            "model: {name: paper/mnist, int: 3}",
            "2: model.int: model 'paper/mnist' has no such option (got 3) - did you mean 'init'?",
        ),
        ("model", "model: {name: paper/mnist, classes: ten}", "2: model.classes: must be an integer (got 'ten')"),
        ("data", "data: {dataset: digits, batch_size: 0, validation: 9}", "6: data.batch_size: must be greater than 0 (got 0)"),
        (
            "data",
            "data: {dataset: digits, batch_size: 1.5, validation: 9}",
            "6: data.batch_size: must be an integer (got 1.5)",
        ),
        (
            "data",
            "data: {dataset: digits, batch_size: yes, validation: 9}",
            "6: data.batch_size: must be an integer (got true)",
        ),
        (
            "data",
            "data: {dataset: digits, batch_size: 5, validation: some}",
            "6: data.validation: must be an integer or a number (got 'some')",
        ),
        ("data", "data: {dataset: digits, batch_size: 5, validation: 0}", "6: data.validation: must be greater than 0 (got 0)"),
        (
            "data",
            "data: {dataset: digits, batch_size: 5, validation: 9, download: 1}",
            "6: data.download: must be a boolean (got 1)",
        ),
        (
            "data",
            "data: {dataset: digits, batch_size: 5, validation: 9, augmnt: []}",
            "6: data.augmnt: unknown key (got []) - did you",
        ),
        *(
            ("data", f"data: {{dataset: digits, batch_size: 5, validation: 9, augment: {augment}}}", f"6: data.augment{expected}")
            for augment, expected in (
                ("flip", ": must be a list (got 'flip')"),
                ("[flip]", ".0: must be a mapping of keys to values (got 'flip')"),
                ("[{}]", ".0: must be one augmentation with its options, such as {crop: {size: 24}} (got {})"),
                ("[{flip: {}, crop: {size: 3}}]", ".0: must be one augmentation with its options"),
                ("[{flip: }]", ".0.flip: must be a mapping of keys to values"),
                ("[{flip: {}}, {corp: {}}]", ".1.corp: no augmentation is named 'corp' - did you mean 'crop'?"),
                ("[{crop: {sice: 3}}]", ".0.crop.sice: augmentation 'crop' has no such option (got 3) - did you mean 'size'?"),
                ("[{crop: {size: 2.5}}]", ".0.crop.size: must be an integer (got 2.5)"),
                ("[{crop: {}}]", ".0.crop: a crop needs size, padding or both"),
            )
        ),
        (
            "optim",
            "optim: {name: adma, lr: 0.1}",
            "7: optim.name: must be one of 'adam', 'adamw', 'sgd' (got 'adma') - did you mean 'adam', 'adamw'?",
        ),
        ("optim", "optim: {lr: 0.1}", "7: optim.name: is missing"),
        ("optim", "optim: {name: adam}", "7: optim.lr: is missing"),
        ("optim", "optim: {name: adam, lr: .nan}", "7: optim.lr: must be a finite number (got nan)"),
        ("optim", "optim: {name: adam, lr: .inf}", "7: optim.lr: must be a finite number (got inf)"),
        ("optim", "optim: {name: adam, lr: -1}", "7: optim.lr: must be greater than 0 (got -1)"),
        ("optim", "optim: {name: sgd, lr: 1, betas: [0, 0]}", "7: optim.betas: unknown key (got [0, 0])"),
        ("optim", "optim: {name: adam, lr: 1, momentum: 0.9}", "7: optim.momentum: unknown key (got 0.9)"),
        ("optim", "optim: {name: sgd, lr: 1, momentun: 0}", "7: optim.momentun: unknown key (got 0) - did you mean 'momentum'?"),
        (
            "optim",
            "optim: {name: sgd, lr: 1, nesterov: true}",
            "7: optim.nesterov: must be false where optim.momentum is 0: set that too, to 0.9 for one (got true)",
        ),
        ("optim", "optim: {name: adam, lr: 1, betas: [0, 1]}", "7: optim.betas.1: must be less than 1 (got 1)"),
        ("schedule", "schedule: {name: step, gamma: 0.1}", "8: schedule.every: is missing"),
        ("schedule", "schedule:", "8: schedule: must be a mapping of keys to values"),
        (
            "train",
            "train: {epochs: 1, precision: float}",
            "9: train.precision: must be 'fp32', 'tf32', 'bf16' or 'fp16' (got 'float')",
        ),
        ("train", "train: {epochs: 1, device: gpu}", "9: train.device: must be 'auto', 'cpu' or 'cuda' (got 'gpu')"),
        ("train", "seed: -1\ntrain: {epochs: 1}", "9: seed: must be greater than or equal to 0 (got -1)"),
        (
            "train",
            "seed: 99999999999999999999\ntrain: {epochs: 1}",
            "9: seed: can not be read: 99999999999999999999 does not fit into 64 bits",
        ),
    ],
)
def test_every_problem_says_where_what_and_what_was_meant(key: str, line: str, expected: str):
    assert [p for p in problems(source(**{key: line})) if p.startswith(expected)], problems(source(**{key: line}))


@pytest.mark.parametrize(
    ("key", "line", "start", "end"),
    [
        ("model", "model: {name: paper/mnits}", "2: model.name: no model is named 'paper/mnits'", "'paper/mnist'"),
        ("model", "model: {name: timm/resnet5O}", "2: model.name: timm has no model named", "'resnet50'"),
        ("model", "model: {name: 'evil.py:run'}", "2: model.name: 'evil.py:run' is a file", "can be named here"),
        (
            "data",
            "data: {dataset: digit, batch_size: 5, validation: 9}",
            "6: data.dataset: no dataset is named 'digit'",
            "'digits'",
        ),
        ("data", "data: {dataset: digits, batch_size: 5, validation: 9, loader: memry}", "6: data.loader: no loader", "'memory'"),
    ],
)
def test_names_are_checked_when_the_recipe_is_read(key: str, line: str, start: str, end: str):
    (problem,) = problems(source(**{key: line}))
    assert problem.startswith(start) and end in problem


def test_feedback_rules_and_their_options_are_checked():
    text = GOOD.replace("rule: bp", "rule: bpp").replace("gain: 0.5", "gian: 0.5")
    first, second = problems(source(text))
    assert first.startswith("4: feedback.0.rule: no rule is named 'bpp'") and "'bp'" in first
    assert second == "5: feedback.1.gian: rule 'fa' has no such option (got 0.5) - did you mean 'gain', 'init'?"
    (value,) = problems(source(GOOD.replace("gain: 0.5", "gain: high")))
    assert value == "5: feedback.1.gain: must be a number (got 'high')"
    (refused,) = problems(source(GOOD.replace("rule: fa, gain: 0.5", "rule: usf, scale: -1")))
    assert refused.startswith("5: feedback.1: scale must be a positive number")


def test_a_pattern_that_can_never_match_is_refused():
    (problem,) = problems(source(GOOD.replace('"output"', '"*"')))
    assert problem == "5: feedback.1.match: feedback.0 has this pattern already, and the first match wins (got '*')"
    (empty,) = problems(source(GOOD[: GOOD.index("feedback")] + "feedback: []\n" + GOOD[GOOD.index("data:") :]))
    assert empty == "3: feedback: must have at least 1 entry (got [])"


def test_hooks_and_their_options_are_checked():
    def hooks(*entries: str) -> Source:
        return source(optim="optim: {name: adam, lr: 1e-3}\nhooks:\n" + "\n".join(f"  - {{{entry}}}" for entry in entries))

    read = load(
        hooks("name: freeze_signs, after: 0.1", "name: alignment, match: [dense, 'conv*']", "name: dale, match: null")
    ).hooks
    assert [(h.name, h.match, h.options) for h in read] == [
        ("freeze_signs", None, {"after": 0.1}),
        ("alignment", ["dense", "conv*"], {}),
        ("dale", None, {}),
    ]
    assert load(source()).hooks == []
    wrong = ("name: freeze_sign", "name: alignment, stength: 2", "name: alignment, strength: much")
    found = problems(hooks(*wrong, "name: freeze_signs, after: 1.5", "after: 3", "name: manhattan, match: 4"))
    assert sorted(found) == sorted([
        "9: hooks.0.name: no hook is named 'freeze_sign' - did you mean 'freeze_signs'?; `fahooks ls hooks` lists all",
        "10: hooks.1.stength: hook 'alignment' has no such option (got 2) - did you mean 'strength'?",
        "11: hooks.2.strength: must be a number (got 'much')",
        "12: hooks.3: after must be a number of steps, a whole one (after=0 is the start), or a fraction of "
        "training above 0 and below 1, got 1.5",
        "13: hooks.4.name: is missing",
        "14: hooks.5.match: must be a string or a list (got 4)",
    ])  # fmt: skip


def test_all_problems_come_at_once():
    wrong = source(name="nmae: x", model="model: {name: nothing/here}", optim="optim: {name: adam, lr: fast}", train="train: {}")
    found = problems(wrong)
    assert [line.split(": ")[1] for line in found] == ["name", "optim.lr", "train.epochs", "nmae", "model.name"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: a recipe is a mapping of keys to values"),
        ("# nothing\n", "1: a recipe is a mapping of keys to values"),
        ("[1, 2]", "1: a recipe is a mapping of keys to values (got [1, 2])"),
        ("just words", "1: a recipe is a mapping of keys to values (got 'just words')"),
        ("name: [1, 2", "1: not YAML: "),
        ("name: a\n\tb: 3", "2: not YAML: "),
        ("name: a\n---\nname: b", "2: not YAML: "),
        ("name: \0", "1: not YAML: "),
        ("name: *nothing", "1: not YAML: found undefined alias"),
        ("[" * 5000, "1: "),
        ("a: &a [*a]", "1: too much for a recipe: more than 20 levels"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdef", "bcdefg", strict=True)),
            "1: too much for a recipe: more than 5,000 values",
        ),
        ("name: !!python/object/apply:os.getcwd []", "1: name: can not be read: "),
        ("name: !mine x", "1: name: can not be read: "),
        ("name: a\nname: b", "2: name: given twice, first in line 1"),
        ("train:\n  epochs: 1\n  epochs: 2", "3: train.epochs: given twice, first in line 2"),
        ("[1]: a", "1: a key must be a word"),
        ("seed: 2020-13-45", "1: seed: "),
        ("<<: {name: x}", "1: <<: unknown key"),
        (f"seed: {'9' * 5000}", "1: seed: "),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_line(text: str, expected: str):
    assert any(problem.startswith(expected) for problem in problems(Source("r.yaml", text))), problems(Source("r.yaml", text))


def test_numbers_may_be_written_as_people_write_them():
    assert load(source(optim="optim: {name: adam, lr: 1e-4, weight_decay: 2E3}")).optim.weight_decay == 2000


def test_a_warm_up_that_the_run_ends_in_is_refused():
    schedule = "schedule: {name: constant, warmup: %s}"
    assert load(source(schedule=schedule % 3)).schedule.warmup == 3
    expected = "8: schedule.warmup: must be at most train.epochs, 3, for the learning rate to arrive at what the schedule says"
    assert problems(source(schedule=schedule % 3.5)) == [f"{expected} (got 3.5)"]
    assert problems(source(), "schedule.warmup=2", "train.epochs=1") == [f"--set: {expected[3:].replace('3', '1')} (got 2)"]


def test_a_run_directory_is_no_recipe(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").touch()
    with pytest.raises(
        InputError,
        match="is a run directory: `fahooks train --resume .*run` goes on with it unless it is finished, and .*resolved.yaml is",
    ):
        find(str(tmp_path / "run"))
    with pytest.raises(InputError, match="no recipe is named .*, and there is a folder of that name, but no file"):
        find(str(tmp_path))


def test_folders_of_images_that_are_missing_are_told_with_everything_else(tmp_path: Path):
    (tmp_path / "images").mkdir()

    def told(data: str, *, here: bool = True) -> list[str]:
        line = f"data: {{dataset: imagefolder, batch_size: 5, validation: 9, limit: 9, {data}}}"
        with pytest.raises(RecipeError) as caught:
            load_marked(source(data=line), here=here)
        return [problem.removeprefix("r.yaml:6: data.") for problem in caught.value.problems]

    limit = "limit: must be more than the 9 images of data.validation, or none are left (got 9)"
    path = "dataset_options: {path: images}"
    assert told(f"root: /no/where, {path}") == [limit, "root: there is no such folder (got '/no/where')"]
    assert told(f"root: {tmp_path}, dataset_options: {{path: imagse}}") == [
        limit,
        f"dataset_options.path: there is no such folder (got {shown(f'{tmp_path}/imagse')})",
    ]
    assert told("root: /no/where, dataset_options: {path: /no/images}")[1:] == [
        "dataset_options.path: there is no such folder (got '/no/images')"
    ]
    for there in (f"root: {tmp_path}, {path}", f"root: /no/where, dataset_options: {{path: {tmp_path}}}"):
        assert told(there) == [limit]
    assert told(f"root: /no/where, {path}", here=False) == [limit], "a recipe may be checked where its data are not"


# Overrides.


def test_overrides_change_keys_and_later_ones_win():
    read = load(source(), ["train.epochs=7", "train.epochs=9", "optim.lr=1e-4", "feedback.1.rule=usf_sn", "probes.every=5"][:3])
    assert (read.train.epochs, read.optim.lr) == (9, 1e-4)
    replaced = load(source(), ["feedback=[{rule: usf_sn}]", "probes.every=5", "optim={weight_decay: 1, name: sgd, lr: 2}"])
    assert [(f.match, f.rule) for f in replaced.feedback] == [("*", "usf_sn")]
    assert (replaced.probes.every, replaced.optim.name) == (5, "sgd")
    assert load(source(), ["feedback.1.gain=2.0"]).feedback[1].options == {"gain": 2.0}
    assert load(source(), ["probes.every=null"]).probes.every is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epoch=3", "--set: train.epoch: unknown key (got 3) - did you mean 'epochs'?"),
        ("trian.epochs=3", "--set: trian: unknown key (got {'epochs': 3}) - did you mean 'train'?"),
        ("train.epochs", "--set: must be dotted.key=value, such as train.epochs=1 (got 'train.epochs')"),
        ("=3", "--set: must be dotted.key=value, such as train.epochs=1 (got '=3')"),
        ("train..epochs=3", "--set: must be dotted.key=value, such as train.epochs=1 (got 'train..epochs=3')"),
        ("train.epochs=many", "--set: train.epochs: must be an integer (got 'many')"),
        ("train.epochs=[1", "--set: train.epochs: not YAML: "),
        ("train.epochs=", "--set: train.epochs: must be an integer (got null)"),
        ("optim.learning_rate=1", "--set: optim.learning_rate: unknown key (got 1) - did you mean 'lr'?"),
        ("optim.Eta=1", "--set: optim.Eta: unknown key (got 1) - did you mean 'lr'?"),
        ("lr=1", "--set: lr: unknown key (got 1) - did you mean 'optim.lr'?"),
        ("train.bs=1", "--set: train.bs: unknown key (got 1) - did you mean 'data.batch_size'?"),
        ("epochs=1", "--set: epochs: unknown key (got 1) - did you mean 'train.epochs'?"),
        ("network=1", "--set: network: unknown key (got 1) - did you mean 'model'?"),
        ("data.zzz=null", "--set: data.zzz: unknown key (got null)"),
        ("name.x=3", "--set: name.x: there is no such key, since name is 'small/run'"),
        ("feedback.7.rule=fa", "--set: feedback.7.rule: there is no such key, since feedback has the entries 0 to 1"),
        ("feedback.x=fa", "--set: feedback.x: there is no such key, since feedback has the entries 0 to 1"),
        ("0.1=3", "--set: 0: unknown key"),
        ("base=mnist/fa", "--set: base: can only be given in a file"),
        ("model.init=fanin", "--set: model.init: must be 'fan_in' or 'default' (got 'fanin') - did you mean 'fan_in'?"),
    ],
)
def test_wrong_overrides_are_named_as_such(override: str, expected: str):
    (problem,) = problems(source(), override)
    assert problem.startswith(expected)


# Bases.


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_mappings_merge_with_the_base_and_lists_replace(tmp_path: Path):
    write(tmp_path, parent=GOOD, child="base: parent.yaml\nname: child\ntrain: {threads: 1}\nfeedback: [{rule: usf_sn}]\n")
    read = load(find(str(tmp_path / "child.yaml")))
    assert (read.name, read.train.epochs, read.train.threads) == ("child", 3, 1)
    assert [f.rule for f in read.feedback] == ["usf_sn"]


def test_a_section_that_names_another_thing_takes_nothing_over(tmp_path: Path):
    write(
        tmp_path,
        parent=GOOD,
        other="base: parent.yaml\nmodel: {name: timm/resnet10t}\noptim: {name: sgd, lr: 1}\nschedule: {name: cosine}\n",
        same="base: parent.yaml\nmodel: {name: paper/mnist, activation: tanh}\nschedule: {name: step, every: 3}\n",
        short="base: parent.yaml\noptim: {name: sgd}\n",
    )
    read = load(find(str(tmp_path / "other.yaml")))
    assert (read.model.options, read.optim, read.schedule) == ({}, recipe.SGD(name="sgd", lr=1), recipe.Cosine(name="cosine"))
    read = load(find(str(tmp_path / "same.yaml")))
    assert read.model.options == {"init": "fan_in", "activation": "tanh"}
    assert read.schedule == recipe.Step(name="step", every=3, gamma=0.1)
    assert problems(find(str(tmp_path / "short.yaml"))) == [
        f"{tmp_path / 'short.yaml'}:2: optim.lr: is missing: that of 'adam' is not taken over"
    ]


def test_naming_another_thing_by_set_keeps_what_was_set():
    for changes in (["model.name=timm/resnet10t", "model.block_args=3"], ["model.block_args=3", "model.name=timm/resnet10t"]):
        assert load(source(), changes).model.options == {"block_args": 3}
    assert load(source(), ["model.name=paper/mnist"]).model.options == {"init": "fan_in"}
    assert problems(source(), "optim.name=sgd") == ["--set: optim.lr: is missing: that of 'adam' is not taken over"]
    with pytest.raises(RecipeError, match="^--sweep: model.name: timm has no model named 'nothing'"):
        load(source(), swept=["model.name=timm/nothing"])


def test_what_names_another_rule_hook_dataset_or_loader_takes_no_options_over(tmp_path: Path):
    parent = """\
base: mnist/fa
feedback: [{match: conv1, rule: fa, gain: 2.0}, {rule: usf, scale: 0.5}]
hooks: [{name: freeze_signs, match: "conv*", after: 3}]
data: {dataset: imagefolder, dataset_options: {path: x}, loader: ffcv, loader_options: {mode: raw}}
"""
    write(tmp_path, parent=parent, child="base: parent.yaml\ndata: {dataset: digits, loader: memory}\n")
    read = load(find(str(tmp_path / "child.yaml")))
    assert (read.data.dataset_options, read.data.loader_options) == ({}, {})
    base = find(str(tmp_path / "parent.yaml"))
    changes = ("feedback.0.rule=usf", "hooks.0.name=dale", "data.dataset=digits", "data.loader=auto")
    read = load(base, changes)
    assert [(f.match, f.rule, f.options) for f in read.feedback] == [("conv1", "usf", {}), ("*", "usf", {"scale": 0.5})]
    assert [(h.name, h.match, h.options) for h in read.hooks] == [("dale", "conv*", {})]
    assert (read.data.dataset_options, read.data.loader_options) == ({}, {})
    same = load(base, ("feedback.0.rule=fa", "hooks.0.name=freeze_signs", "data.dataset=imagefolder", "data.loader=ffcv"))
    assert (same.feedback[0].options, same.hooks[0].options) == ({"gain": 2.0}, {"after": 3}), "control: they name the same"
    assert (same.data.dataset_options, same.data.loader_options) == ({"path": "x"}, {"mode": "raw"})
    kept = load(base, ("feedback.0.scale=0.25", "feedback.0.rule=usf", "hooks.0.name=freeze_signs", "hooks.0.after=7"))
    assert (kept.feedback[0].options, kept.hooks[0].options) == ({"scale": 0.25}, {"after": 7})
    assert problems(base, "data.dataset=imagefolder", "data.dataset_options={}") == [
        "--set: data.dataset_options.path: is missing"
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("hooks.0.name=dale", "hooks.0.name: there is no such key, since hooks is empty"),
        ("data.augment.0=flip", "data.augment.0: there is no such key, since data.augment is empty"),
        ("feedback.rule=bp", "feedback.rule: there is no such key, since feedback has the entries 0 to 1, as in feedback.0.rule"),
        (
            "feedback.2.rule=bp",
            "feedback.2.rule: there is no such key, since feedback has the entries 0 to 1, as in feedback.0.rule",
        ),
        ("feedback=[]", "feedback: must have at least 1 entry (got [])"),
        ("optim.betas=0.9", "optim.betas: must be a list of two numbers, such as [0.9, 0.999] (got 0.9)"),
        ("optim.betas=[0.9]", "optim.betas: must be a list of two numbers, such as [0.9, 0.999] (got [0.9])"),
        ("seed=!!float x", "seed: can not be read: 'x' is no float"),
        (
            "data.augment=[{crop: {size:24}}]",
            "data.augment.0.crop.size:24: augmentation 'crop' has no such option (got null) - "
            "did you mean 'size: 24', with a space?",
        ),
    ],
)
def test_a_slip_in_set_is_one_line_that_says_what_to_write(change: str, problem: str):
    assert problems(source(), change) == [f"--set: {problem}"]


def test_a_shipped_recipe_can_be_the_base(tmp_path: Path):
    write(tmp_path, mine="base: mnist/fa\nname: mine\nseed: 4\n")
    read = load(find(str(tmp_path / "mine.yaml")))
    assert (read.model.name, read.seed, read.feedback[0].rule) == ("paper/mnist", 4, "fa")


def test_problems_name_the_file_that_wrote_the_key(tmp_path: Path):
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    write(tmp_path, parent=GOOD.replace("epochs: 3", "epochs: x"), child="base: parent.yaml\noptim:\n  lr: y\n")
    assert problems(find(str(child))) == [
        f"{child}:3: optim.lr: must be a number (got 'y')",
        f"{parent}:9: train.epochs: must be an integer (got 'x')",
    ]


def test_bases_that_do_not_exist_or_lead_in_circles_are_refused(tmp_path: Path):
    write(tmp_path, a="base: b.yaml\n", b="base: a.yaml\n", c="base: nowhere\n", d="base: [a, b]\n", e="base: e.yaml")
    assert any(
        p.startswith(f"{tmp_path / 'b.yaml'}:1: base: recipes that are based on each other")
        for p in problems(find(str(tmp_path / "a.yaml")))
    )
    assert any("based on each other" in p for p in problems(find(str(tmp_path / "e.yaml"))))
    assert any(
        p.startswith(f"{tmp_path / 'c.yaml'}:1: base: no recipe is named 'nowhere'")
        for p in problems(find(str(tmp_path / "c.yaml")))
    )
    assert any(
        p.startswith(f"{tmp_path / 'd.yaml'}:1: base: must be the name of one recipe")
        for p in problems(find(str(tmp_path / "d.yaml")))
    )


def test_the_base_of_a_shipped_recipe_is_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "_base").mkdir()
    (tmp_path / "_base" / "mnist.yaml").write_text("seed: 123")
    monkeypatch.chdir(tmp_path)
    assert load("mnist/fa").seed == 0


# Finding.


def test_find_takes_files_and_shipped_names(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(GOOD)
    assert find(str(tmp_path / "r.yaml")).text == GOOD
    assert find("mnist/fa").text == find("mnist/fa.yaml").text


@pytest.mark.parametrize("name", ["mnist/fb", "/no/such/file.yaml", "", ".", "~nobody-here/x", "a" * 5000, "x\0y"])
def test_a_recipe_that_does_not_exist_is_one_line(name: str):
    with pytest.raises(InputError, match="no recipe is named") as caught:
        find(name)
    assert "\n" not in str(caught.value)


def test_a_near_miss_of_a_shipped_name_is_offered():
    with pytest.raises(InputError, match="did you mean 'mnist/fa'"):
        find("mnist/fb")


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match="can not be read"):
        find(str(tmp_path / "r.yaml"))


def test_recipes_describe_themselves():
    rows = {row.name: row for row in recipe.list_recipes()}
    assert list(rows) == sorted(rows)
    assert not any(name.startswith("_") for name in rows)
    assert rows["mnist/fa"].paper == "Table 1, FA: 1.1 %"
    assert rows["cifar10-2/dfa"].paper == "Table 1, DFA: not in the paper"
    assert rows["quickstart"].paper == ""
    assert all(row.summary for row in rows.values())
