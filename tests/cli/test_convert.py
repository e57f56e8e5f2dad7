from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import fahooks
from fahooks import models
from fahooks.cli import main

FACTORIES = '''
import shutil
from dataclasses import dataclass

import torch
from torch import nn

import beside


def small(width=4):
    print("building")
    net = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(9 * width, 2))
    net.input_size = (1, 5, 5)
    return net


def sizeless():
    return nn.Linear(3, 2)


class Bypassing(nn.Linear):
    def forward(self, input):
        return torch.addmm(self.bias, input, self.weight.t())


def bypassing():
    net = nn.Sequential(nn.Linear(3, 3), Bypassing(3, 2))
    net.input_size = (3,)
    return net


class Language(nn.Module):
    """Tied weights, integer input."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.example_inputs = torch.arange(6).reshape(2, 3)

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens)))


def language():
    return Language()


def failing():
    return {}["absent"]


def leaving():
    raise SystemExit(0)


def nothing():
    return 3


def destructive(folder):
    shutil.rmtree(folder)
    return small()


@dataclass
class Configured:
    width: int


def configured():
    return small(Configured(beside.WIDTH).width)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factories")
    (folder / "beside.py").write_text("WIDTH = 3\n")
    (folder / "some_factories.py").write_text(FACTORIES)
    return folder / "some_factories.py"


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def rows(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def passed(*arguments: object) -> list[str]:
    """The lines that a conversion whose verification holds prints."""
    result = convert(*arguments)
    assert result.exit_code == 0, result.output
    for claim in ("forward unchanged  ok ", "rule in effect     ok ", "audit clean        ok "):
        assert claim in result.stdout
    return result.stdout.splitlines()


def document(*arguments: object) -> dict[str, Any]:
    return json.loads(convert(*arguments, "--json").stdout)


def refused(*arguments: object) -> str:
    """The one line on stderr with which bad input is refused."""
    result = convert(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout.replace("building\n", "") == ""
    assert result.stderr.startswith("fahooks: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("fahooks: ").rstrip()


def test_a_line_tells_of_each_layer(file: Path):
    lines = rows(passed(f"{file}:small"))
    assert ["0", "Conv2d", "4x1x3x3", "fa", "144", "converted"] in lines
    assert ["4", "Linear", "2x36", "fa", "288", "converted"] in lines
    assert "2 layers converted, 0 skipped, 432 bytes added".split() in lines


def test_layers_can_be_left_out(file: Path):
    assert "0 Conv2d 4x1x3x3 0 skipped: excluded".split() in rows(passed(f"{file}:small", "--exclude", "0"))
    lines = passed(f"{file}:small", "--include", "re:^[4-9]$", "--rule", "usf_sn")
    assert "0 Conv2d 4x1x3x3 0 skipped: not included".split() in rows(lines)
    assert lines[-1].endswith("save 1 layer left out as asked")


def test_the_first_of_several_rules_that_matches_decides(file: Path):
    found = document(f"{file}:small", "--rule", "0=usf", "--rule", "re:[0-4]=sham", "--rule", "bp")
    assert found["rule"] == {"0": "usf", "re:[0-4]": "sham", "*": "bp"}
    assert [layer["rule"] for layer in found["layers"]] == ["usf", "sham"]
    found = document(f"{file}:small", "--rule", "0=bp", "--rule", "*=fa")
    assert [layer["reason"] for layer in found["layers"]] == ["rule bp: left as it is", None]
    assert found["exit_code"] == 0


def test_a_rule_that_decides_for_no_layer_is_refused(file: Path):
    line = refused(f"{file}:small", "--rule", "fa", "--rule", "4=bp")
    assert line == "rule: '4' decides for no layer: '*' before it takes all that it matches; put it first, or leave it out"


def test_a_rule_by_pattern_leaves_the_rest_to_backprop(file: Path):
    assert "0 Conv2d 4x1x3x3 0 skipped: no pattern matches".split() in rows(passed(f"{file}:small", "--rule", "4=fa"))


def test_options_reach_rule_and_model(file: Path):
    arguments = (f"{file}:small", "--model-option", "width=6", "--option", "gain=1e-2", "--option", "distribution=uniform")
    found = document(*arguments)
    assert found["model_options"] == {"width": 6}
    assert found["options"] == {"gain": 0.01, "distribution": "uniform"}
    assert found["layers"][0]["weight_shape"] == [6, 1, 3, 3]


def test_json_is_one_document_with_nothing_else_on_stdout(file: Path):
    result = convert(f"{file}:small", "--rule", "usf_init", "--seed", "3", "--json")
    assert "building" in result.stderr
    found = json.loads(result.stdout)
    assert (found["model"], found["rule"], found["seed"]) == (f"{file}:small", "usf_init", 3)
    assert found["layers"][1] == {
        "name": "4",
        "type": "Linear",
        "weight_shape": [2, 36],
        "rule": "usf_init",
        "memory_bytes": 288,
        "reason": None,
        "grows": False,
        "converted": True,
    }
    assert found["totals"] == {"layers": 2, "converted": 2, "skipped": 0, "memory_bytes": 432}
    assert {name: check["ok"] for name, check in found["verification"].items() if name != "ok"} == {
        "forward": True,
        "rules": True,
        "audit": True,
    }
    assert (found["output"], found["exit_code"]) == (None, 0)


def test_a_bypassed_rule_fails_the_verification(file: Path, tmp_path: Path):
    output = tmp_path / "out.safetensors"
    result = convert(f"{file}:bypassing", "-o", output)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert "    1: the backward pass never asks for its B" in lines
    assert any(line.startswith("    1.weight: unrouted ") for line in lines)
    assert any(line.startswith("forward unchanged  ok") for line in lines)
    assert lines[-1] == f"{output} is not written: the verification failed"
    assert list(tmp_path.iterdir()) == []
    found = document(f"{file}:bypassing", "-o", output)
    assert (found["exit_code"], found["output"], found["verification"]["ok"]) == (1, None, False)
    assert found["verification"]["rules"]["problems"] == [{"culprit": "1", "reason": "the backward pass never asks for its B"}]


def test_left_out_on_purpose_the_same_layer_passes(file: Path):
    assert passed(f"{file}:bypassing", "--exclude", "1")


def loaded(output: Path, spec: str, rule: str, seed: int) -> nn.Module:
    """What the help says: build and convert in the same way, then load."""
    torch.manual_seed(12345)
    model = models.build(spec)
    fahooks.convert(model, rule, seed=seed)
    load_model(model, str(output), strict=True)
    return model


def test_what_the_help_says_about_loading_runs_as_printed(tmp_path: Path):
    lines = convert("--help").stdout.splitlines()
    (command,) = (line.split("`")[1] for line in lines if line.strip().startswith("After `fahooks convert"))
    program = textwrap.dedent("\n".join(lines[lines.index(next(x for x in lines if "import fahooks" in x)) :]))
    output = tmp_path / "out.safetensors"
    done = CliRunner().invoke(main, [part.replace("out.safetensors", str(output)) for part in command.split()[1:]])
    assert done.exit_code == 0, done.output
    program += "\nprint(model.state_dict()['output.weight'].sum().item())"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == load_file(output)["output.weight"].sum().item()


@pytest.mark.parametrize("factory", ["small", "language"])
@pytest.mark.parametrize("rule", ["fa", "usf_sn"])
def test_the_file_brings_weights_and_feedback_matrices_back(file: Path, tmp_path: Path, factory: str, rule: str):
    spec, output = f"{file}:{factory}", tmp_path / "out.safetensors"
    assert passed(spec, "--rule", rule, "--seed", 5, "-o", output)[-1] == f"wrote {output}"
    assert list(tmp_path.iterdir()) == [output]
    torch.manual_seed(5)
    expected = models.build(spec)
    fahooks.convert(expected, rule, seed=5)
    found = loaded(output, spec, rule, seed=99).state_dict()
    assert set(found) == set(expected.state_dict())
    assert (rule == "fa") == any(".feedback." in name for name in found)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_the_file_says_how_it_was_made(file: Path, tmp_path: Path):
    output = tmp_path / "out.safetensors"
    arguments = ("--option", "gain=0.5", "--model-option", "width=2", "--exclude", "4", "--seed", 7, "-o", output)
    assert document(f"{file}:small", *arguments)["output"] == str(output)
    with safe_open(output, "pt") as stored:
        metadata = stored.metadata()
    assert metadata["model"] == f"{file}:small"
    assert metadata["rule"] == "fa"
    assert json.loads(metadata["options"]) == {"gain": 0.5}
    assert json.loads(metadata["model_options"]) == {"width": 2}
    assert json.loads(metadata["exclude"]) == ["4"]
    assert json.loads(metadata["seed"]) == 7
    assert metadata["fahooks"] == fahooks_version()


def fahooks_version() -> str:
    return CliRunner().invoke(main, ["--version"]).stdout.split()[1]


def test_an_older_file_is_replaced_or_left_whole(file: Path, tmp_path: Path):
    output = tmp_path / "out.safetensors"
    output.write_text("older")
    assert refused(f"{file}:failing", "-o", output)
    assert convert(f"{file}:bypassing", "-o", output).exit_code == 1
    assert output.read_text() == "older"
    passed(f"{file}:small", "-o", output)
    assert loaded(output, f"{file}:small", "fa", seed=0)
    assert list(tmp_path.iterdir()) == [output]


def test_a_path_that_can_not_be_written_is_refused_before_the_work(file: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    absent, below_a_file = tmp_path / "absent" / "out", tmp_path / "file" / "out"
    assert refused(f"{file}:failing", "-o", absent) == f"{str(absent)!r} can not be written: No such file or directory"
    assert refused(f"{file}:failing", "-o", below_a_file) == f"{str(below_a_file)!r} can not be written: Not a directory"
    assert refused(f"{file}:failing", "-o", tmp_path) == f"{str(tmp_path)!r} can not be written: it is a folder"


def test_a_folder_that_vanishes_meanwhile_is_one_line(file: Path, tmp_path: Path):
    folder = tmp_path / "vanishing"
    folder.mkdir()
    result = convert(f"{file}:destructive", "--model-option", f"folder={folder}", "-o", folder / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"fahooks: {str(folder / 'out')!r} can not be written: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("timm/resnet10x",), "timm has no model named 'resnet10x' - did you mean "),
        (("torchvision/swin_x",), "torchvision has no model named 'swin_x' - did you mean 'swin_"),
        (("paper/minst",), "no model is named 'paper/minst' - did you mean 'paper/mnist'"),
        (("paper/mnist", "--rule", "usf_ns"), "no rule is named 'usf_ns' - did you mean 'usf_sn'"),
        (("paper/mnist", "--rule", "conv*=usf_ns"), "no rule is named 'usf_ns' - did you mean 'usf_sn'"),
        (("paper/mnist", "--rule", "fa", "--rule", "bp"), "--rule gives two rules for all layers: 'fa' and 'bp'"),
        (("paper/mnist", "--rule", "a=fa", "--rule", "a=bp"), "--rule gives two rules for 'a': 'fa' and 'bp'"),
        (
            ("paper/mnist", "--rule", "conv*=fa", "--option", "gain=2"),
            "--option needs one --rule for all layers: it does not say which of the rules by PATTERN it is for; a recipe does",
        ),
        (("paper/mnist", "--rule", "convv1=fa"), "rule: 'convv1' matches none of the 4 layers - did you mean 'conv1'"),
        (("paper/mnist", "--exclude", "convv1"), "exclude: 'convv1' matches none of the 4 layers - did you mean 'conv1'"),
        (("paper/mnist", "--include", "re:con(v"), "include: 're:con(v' is no regular expression: missing ), "),
        (("paper/mnist", "--exclude", "*"), "nothing converted: all 4 layers were left out"),
        (("paper/mnist", "--option", "gian=2"), "rule 'fa' has no option 'gian' - did you mean 'gain'"),
        (("paper/mnist", "--option", "seed=2"), "rule 'fa' has no option 'seed'"),
        (("paper/mnist", "--option", "rule=usf"), "rule 'fa' has no option 'rule'"),
        (("paper/mnist", "--option", "gain=abc"), "rule 'fa': gain must be a number (got 'abc')"),
        (("paper/mnist", "--seed", "x"), "Invalid value for '--seed': 'x' is not a valid integer; `"),
        (("paper/mnist", "--sed", "1"), "there is no option --sed - did you mean '--seed'; `"),
        ((), "Missing argument 'MODEL'; `"),
        (("paper/mnist", "--option", "gain"), "--option must be KEY=VALUE, such as --option gain=0.5, got 'gain'"),
        (("paper/mnist", "--option", "gain=[1"), "--option 'gain=[1': the value is no YAML: "),
        (("paper/mnist", "--rule", "usf", "--option", "scale=no"), "rule 'usf': scale must be a number (got False)"),
        (("paper/mnist", "--model-option", "clases=3"), "model 'paper/mnist' has no option 'clases' - did you mean 'classes'?"),
        (
            ("paper/mnist", "--input-size", "1,28"),
            "'paper/mnist' does not run on an input of shape (2, 1, 28) (--input-size sets another): ",
        ),
        (
            ("paper/mnist", "--input-size", "1,0,28"),
            "--input-size must be positive whole numbers, such as 3,224,224, got '1,0,28'",
        ),
        (("paper/mnist", "--input-size", "1x28"), "--input-size must be positive whole numbers, such as 3,224,224, got '1x28'"),
        (("absent.py:net",), "there is no file 'absent.py' to take 'net' from"),
    ],
)
def test_what_was_given_wrong_is_told_in_one_line(arguments: tuple[str, ...], message: str):
    assert refused(*arguments).startswith(message)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("smal", "{file!r} has no function 'smal' - did you mean 'small'?"),
        ("failing", "model '{file}:failing' could not be built with no options: KeyError: 'absent'"),
        ("leaving", "model '{file}:leaving' could not be built with no options: SystemExit: 0"),
        ("nothing", "'{file}:nothing' did not return a torch.nn.Module, but an object of type int"),
        ("sizeless", "the input shape of '{file}:sizeless' is not known: give the model an attribute, "),
    ],
)
def test_what_is_wrong_with_a_factory_is_told_in_one_line(file: Path, factory: str, message: str):
    assert refused(f"{file}:{factory}").startswith(message.format(file=str(file)))


def test_the_input_size_can_be_given(file: Path):
    assert passed(f"{file}:sizeless", "--input-size", "5,3")
    assert "or pass --input-size" in refused(f"{file}:sizeless")


def test_a_factory_may_use_dataclasses_and_what_lies_beside_it(file: Path):
    assert document(f"{file}:configured")["layers"][0]["weight_shape"] == [3, 1, 3, 3]


def test_a_seed_gives_the_same_bits_again(file: Path, tmp_path: Path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        passed(f"{file}:small", "--seed", seed, "-o", tmp_path / name)
    first, again, other = (load_file(tmp_path / name) for name in ("first", "again", "other"))
    for name in ("0.weight", "0.feedback.matrix"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_a_terminal_gets_a_table(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fahooks.cli.convert.on_terminal", lambda: True)
    monkeypatch.setattr("fahooks.cli.convert.Console", lambda: Console(force_terminal=True, width=100, color_system="standard"))
    result = convert(f"{file}:small", "--exclude", "0")
    assert result.exit_code == 0
    assert "\x1b[32mconverted" in result.stdout
    assert "\x1b[33mskipped: excluded" in result.stdout


@pytest.mark.parametrize(
    "model",
    [
        "timm/resnet50",
        "timm/vit_tiny_patch16_224",
        "timm/tf_efficientnet_b0",
        "timm/beit_base_patch16_224",
        "torchvision/vit_b_16",
        "torchvision/swin_t",
    ],
)
def test_models_of_both_libraries_pass(model: str):
    assert passed(model, "--rule", "usf_sn")


def test_layers_of_a_library_model_have_their_names():
    lines = passed("timm/resnet10t", "--input-size", "3,64,64", "--exclude", "fc")
    assert lines[1].split()[:3] == ["conv1.0", "Conv2d", "24x3x3x3"]
    assert "14 layers converted, 1 skipped" in " ".join(lines)
