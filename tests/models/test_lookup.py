from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fahooks import models
from fahooks.plugins import InputError, UnknownName


def test_options_of_the_user_come_before_what_the_images_suggest():
    assert models.build_for_images("paper/mnist", (1, 28, 28), 10, classes=26)(torch.zeros(1, 1, 28, 28)).shape == (1, 26)


def test_timm_models_have_their_own_input_size_and_fit_images():
    model = models.build("timm/test_resnet.r160_in1k", num_classes=5)
    shape = models.input_size(model, "timm/test_resnet")
    assert shape == (3, 160, 160)
    assert model(torch.zeros(1, *shape)).shape == (1, 5)
    assert models.build_for_images("timm/test_resnet", (1, 32, 32), 4).eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(("name", "side"), [("squeezenet1_1", 224), ("vit_b_16", 224)])
def test_torchvision_models_have_the_input_size_they_were_made_for(name: str, side: int):
    with torch.device("meta"):
        model = models.build(f"torchvision/{name}")
    assert models.input_size(model, f"torchvision/{name}") == (3, side, side)


def test_torchvision_backbones_are_not_downloaded():
    with torch.device("meta"):
        model = models.build("torchvision/lraspp_mobilenet_v3_large")
    with pytest.raises(InputError, match="input shape of 'torchvision/lraspp_mobilenet_v3_large' is not known"):
        models.input_size(model, "torchvision/lraspp_mobilenet_v3_large")


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("paper/mnits", "'paper/mnist'"),
        ("timm/resnet5", "'resnet50'"),
        ("torchvision/resnet51", "'resnet50'"),
        ("resnet50", "'timm/resnet50'"),
    ],
)
def test_unknown_names_are_one_line_with_near_misses(spec: str, near: str):
    for look_up in (models.build, models.check):
        with pytest.raises(UnknownName) as caught:
            look_up(spec)
        assert near in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "option", "meant"),
    [
        ("timm/resnet18", "classes", " - did you mean 'num_classes'?"),
        ("timm/resnet18", "in_channels", " - did you mean 'in_chans'?"),
        ("torchvision/resnet18", "classes", " - did you mean 'num_classes'?"),
        ("torchvision/resnet18", "depth", ""),
    ],
)
def test_an_option_by_the_name_that_another_library_gives_it_is_told_its_own(spec: str, option: str, meant: str):
    with pytest.raises(InputError) as caught:
        models.build(spec, **{option: 3})
    assert str(caught.value).endswith(f"unexpected keyword argument {option!r}{meant}")


@pytest.mark.parametrize("spec", ["paper/mnist", "timm/resnet50", "timm/resnet50.a1_in1k", "torchvision/resnet50"])
def test_known_names_pass_the_check(spec: str):
    models.check(spec)


def test_options_that_a_model_does_not_take_are_named():
    with pytest.raises(InputError, match="no option 'clases' - did you mean 'classes'"):
        models.build("paper/mnist", clases=3)
    with pytest.raises(InputError, match=r"'timm/test_resnet' could not be built with nonsense=3: TypeError"):
        models.build("timm/test_resnet", nonsense=3)


FACTORY = """
from torch import nn
def small(width=4):
    model = nn.Linear(width, 2)
    model.input_size = (width,)
    return model
def nothing():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return path


def test_a_factory_in_a_file_builds_a_model(factory: Path):
    model = models.build(f"{factory}:small", width=6)
    assert isinstance(model, nn.Linear)
    assert models.input_size(model, f"{factory}:small") == (6,)


def test_what_is_wrong_with_a_factory_is_said(factory: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no function 'smal' - did you mean 'small'"):
        models.build(f"{factory}:smal")
    with pytest.raises(InputError, match="did not return a torch.nn.Module, but an object of type int"):
        models.build(f"{factory}:nothing")
    with pytest.raises(InputError, match="there is no file"):
        models.build(f"{tmp_path}/absent.py:small")
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere")
    with pytest.raises(InputError, match="importing .* failed: ModuleNotFoundError"):
        models.build(f"{tmp_path}/broken.py:small")
    with pytest.raises(UnknownName, match="timm/NAME and torchvision/NAME work too$"):
        models.check("paper/mnits")
    with pytest.raises(UnknownName, match="is a file"):
        models.check(f"{factory}:small")


def test_a_file_takes_no_other_module_s_place(tmp_path: Path):
    path = tmp_path / "json.py"
    path.write_text(FACTORY)
    before = dict(sys.modules)
    model = models.build(f"{path}:small")
    assert sys.modules["json"] is json
    (added,) = set(sys.modules) - set(before)
    assert sys.modules[added].__file__ == str(path) and isinstance(model, nn.Linear)
    broken = tmp_path / "unfinished.py"
    broken.write_text("raise SystemExit(1)")
    with pytest.raises(InputError, match="importing .* failed: SystemExit"):
        models.build(f"{broken}:small")
    assert set(sys.modules) - set(before) == {added}


def test_a_model_that_does_not_say_its_input_size_is_an_error(factory: Path):
    with pytest.raises(InputError, match=r"give the model an attribute, model.input_size"):
        models.input_size(nn.Linear(2, 2), f"{factory}:small")
