from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fahooks.plugins import InputError
from fahooks.recipe import Recipe
from fahooks.training import setup as preparation
from fahooks.training.setup import prepare

Tiny = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("torchvision/resnet18", "does not run on images of shape 1x8x8 (CxHxW): RuntimeError: "),
        ("timm/vit_tiny_patch16_224", "does not run on images of shape 1x8x8 (CxHxW): AssertionError: "),
        ("paper/mnist, classes: 9", "must give logits of shape (32, 10) for 32 images of shape 1x8x8 (CxHxW), and gave (32, 9)"),
    ],
)
def test_a_model_that_does_not_take_the_images_is_one_line(tiny: Tiny, model: str, reason: str):
    with pytest.raises(InputError) as caught:
        prepare(tiny(f"model={{name: {model}}}"))
    assert str(caught.value).startswith(f"model {model.split(',')[0]!r} {reason}")
    assert "\n" not in str(caught.value)


def test_trying_a_model_leaves_no_trace(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny("model={name: timm/test_resnet}")
    tried = prepare(recipe)
    after = torch.get_rng_state()
    monkeypatch.setattr(preparation, "try_on", lambda *arguments: None)
    untried = prepare(recipe).model
    assert torch.equal(after, torch.get_rng_state())
    expected = untried.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tried.model.state_dict().items())
    assert [m.training for m in tried.model.modules()] == [m.training for m in untried.modules()]


def test_a_last_batch_of_one_image_is_refused_where_batch_norm_can_not_learn_from_it(tiny: Tiny):
    lonely = ("data.limit=221", "data.batch_size=32", "data.validation=60")  # 161 images: five batches of 32, and one of 1
    with pytest.raises(InputError, match="161 images in batches of 32 leave a pass with a single one"):
        prepare(tiny("model={name: timm/resnet18}", *lonely))
    assert prepare(tiny(*lonely)).train.images == 161, "control: a model without batch norm can"
    setup = prepare(tiny("model={name: timm/resnet18}", "data.limit=222"))
    assert all(int(value) == 0 for key, value in setup.model.state_dict().items() if key.endswith("num_batches_tracked"))
