from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fahooks.plugins import InputError
from fahooks.recipe import Recipe
from fahooks.training import loop_benchmark
from fahooks.training.loop_benchmark import CONTROL, MINIMAL, OURS, minimal_epoch
from fahooks.training.setup import prepare

Tiny = Callable[..., Recipe]


def test_each_loop_is_timed_by_both_clocks(tiny: Tiny):
    speeds = loop_benchmark.compare(tiny(), rounds=2)
    assert [speed.name for speed in speeds] == [MINIMAL, CONTROL, OURS]
    for speed in speeds:
        assert speed.images.keys() == speed.ratios.keys() == {"wall", "cpu"}
        assert min(speed.images.values()) > 0
    assert str(speeds[0].ratios["cpu"]) == "1.000 (1.000 to 1.000)"


def test_the_minimal_loop_learns_from_every_image(tiny: Tiny):
    setup = prepare(tiny("data.augment=[{flip: {}}]"))
    before = setup.model.get_parameter("dense.weight").clone()
    minimal_epoch(setup, 1)
    assert not torch.equal(setup.model.get_parameter("dense.weight"), before)
    assert setup.hooks is None
    steps = {int(state["step"]) for state in setup.optimizer.state.values()}
    assert steps == {len(setup.train)}


@pytest.mark.parametrize("override", ["train.clip_norm=1", "train.ema=0.9", "train.accumulate=2", "train.channels_last=true"])
def test_what_the_minimal_loop_does_not_know_is_refused(override: str, tiny: Tiny):
    with pytest.raises(InputError, match=f"does not know what the recipe asks for with {override.split('=')[0]}"):
        loop_benchmark.compare(tiny(override), rounds=2)
