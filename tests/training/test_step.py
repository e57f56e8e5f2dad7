from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fahooks import models
from fahooks.data import Batch
from fahooks.plugins import InputError
from fahooks.recipe import Recipe
from fahooks.rules import IGNORED, WeightMirror, targets
from fahooks.surgery import feedback_rules
from fahooks.training.setup import Setup, prepare
from fahooks.training.step import loss_of, take_step

Tiny = Callable[..., Recipe]

# Draws are per pass, so brsf and bp_noise are left out.
RULES = ["bp", "fa", "usf", "usf_init", "usf_sn", "frsf", "dfa", "dense_fa", "drtp", "kp"]
SGD = "optim={name: sgd, lr: 0.1, momentum: 0.9}"


def in_float64(recipe: Recipe) -> tuple[Setup, Batch]:
    """A run in float64, without dropout, and a batch of 7."""
    build = models.build_for_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_for_images", lambda *args, **options: in_double(build(*args, **options)))
        setup = prepare(recipe)
    setup.model.eval()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(7, 1, 8, 8, generator=generator).double()
    labels = torch.randint(10, (7,), generator=generator)
    return setup, Batch(images, labels, torch.arange(7), torch.ones(7, dtype=torch.bool), 7)


def in_double(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model.double()


def found_by_a_step(setup: Setup, batch: Batch) -> tuple[float, int, int]:
    """The losses added up, the number of right answers, and that of all examples that count, of the passes of a step."""
    outcomes = take_step(setup, batch)
    right = sum(int((o.answers == o.labels).sum()) for o in outcomes)
    return sum(o.losses.item() for o in outcomes), right, sum(int((o.labels != IGNORED).sum()) for o in outcomes)


def weights(setup: Setup) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in setup.model.named_parameters()}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return max((a[name] - b[name]).abs().max().item() for name in a) > 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("passes", [2, 3, 7])
def test_a_batch_in_several_passes_is_the_whole_batch(tiny: Tiny, rule: str, passes: int):
    trained = []
    for accumulate in (1, passes):
        setup, batch = in_float64(tiny(SGD, f"feedback=[{{rule: {rule}}}]", f"train.accumulate={accumulate}"))
        seen = [found_by_a_step(setup, batch) for _ in range(3)]
        trained.append((weights(setup), seen))
    (whole, seen_whole), (parts, seen_parts) = trained
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    assert [counts for _, *counts in seen_parts] == [counts for _, *counts in seen_whole]
    assert [loss for loss, *_ in seen_parts] == pytest.approx([loss for loss, *_ in seen_whole])
    assert far(whole, weights(in_float64(tiny())[0])), "control: the weights did not move"


def test_the_step_is_that_of_the_mean_loss_written_by_hand(tiny: Tiny):
    setup, batch = in_float64(tiny(SGD, "train.clip_norm=0.2", "train.label_smoothing=0.3", "train.accumulate=2"))
    other, _ = in_float64(tiny(SGD))
    model = other.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        loss, *_ = found_by_a_step(setup, batch)
        expected = torch.full((7, 10), 0.3 / 10, dtype=torch.float64)
        expected[torch.arange(7), batch.labels] += 0.7
        by_hand = -(expected * model(batch.images).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        by_hand.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        assert norm > 0.2, "control: nothing is clipped"
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 0.2 / norm
        optimizer.step()
        assert loss / 7 == pytest.approx(by_hand.item(), rel=1e-6)
    # clip_grad_norm_ divides by the norm plus 1e-6.
    torch.testing.assert_close(weights(setup), dict(model.named_parameters()), rtol=1e-6, atol=1e-7)
    for without in ("train.clip_norm=null", "train.label_smoothing=0"):
        options = [SGD, "train.clip_norm=0.2", "train.label_smoothing=0.3", without]
        different, _ = in_float64(tiny(*options))
        take_step(different, batch)
        once, _ = in_float64(tiny(*options[:3]))
        take_step(once, batch)
        assert far(weights(different), weights(once)), f"control: {without} changes nothing"


def test_hooks_and_rules_that_learn_act_once_a_step(tiny: Tiny):
    hooks = "hooks=[{name: constant_norm}]"
    setup, batch = in_float64(tiny(hooks, "feedback=[{rule: wm}]", "train.accumulate=7"))
    assert setup.hooks is not None
    take_step(setup, batch)
    assert setup.hooks.steps == 1
    draws = [rule.draws for rule in feedback_rules(setup.model).values() if isinstance(rule, WeightMirror)]
    assert len(draws) == 4 and all(draw == 1 for draw in draws)


def test_clipping_comes_before_hooks(tiny: Tiny):
    setup, batch = in_float64(tiny("optim={name: sgd, lr: 0.5}", "hooks=[{name: manhattan}]", "train.clip_norm=1e-3"))
    before = weights(setup)
    take_step(setup, batch)
    moved = (weights(setup)["output.weight"] - before["output.weight"]).abs()
    assert ((moved == 0) | (moved - 0.5 < 1e-12)).all() and moved.max() > 0.4


@pytest.mark.parametrize("rule", ["fa", "drtp", "kp"])
def test_fp16_scales_the_loss_and_takes_the_scale_out_again(tiny: Tiny, rule: str):
    options = ["data.batch_size=16", "optim={name: sgd, lr: 0.1}", f"feedback=[{{rule: {rule}}}]", "train.clip_norm=100"]
    setup, plain = (prepare(tiny(*options, f"train.precision={precision}")) for precision in ("fp16", "fp32"))
    batch = next(iter(plain.train))
    for each in (setup, plain):
        each.model.eval()
        each.model.zero_grad()
    with setup.autocast:
        assert setup.model(batch.images).dtype == torch.float16
    scaled, summed, _ = loss_of(setup, setup.model, batch.images, batch.labels, count=16)
    assert scaled.item() == pytest.approx(summed.item() / 16 * 65536, rel=1e-6)
    start = weights(plain)
    while setup.scaler.get_scale() > 256:  # large factors overflow, and their steps are skipped
        take_step(setup, batch)
        if not far(weights(setup), start):
            continue
        break
    take_step(plain, batch)
    for name, value in weights(plain).items():
        ours, theirs = (weights(setup)[name] - start[name]).flatten(), (value - start[name]).flatten()
        assert torch.linalg.vector_norm(ours - theirs) < 0.1 * torch.linalg.vector_norm(theirs)


def test_a_step_that_overflows_is_skipped_by_weights_hooks_and_rules(tiny: Tiny):
    setup = prepare(tiny("train.precision=fp16", "hooks=[{name: constant_norm}]", "feedback=[{rule: wm}]"))
    assert setup.hooks is not None
    batch = next(iter(setup.train))
    before = setup.model.state_dict()
    before = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
    take_step(setup, replace(batch, images=batch.images * 1e5))
    assert setup.hooks.steps == 0
    assert all(torch.equal(setup.model.state_dict()[name], value) for name, value in before.items())
    assert setup.scaler.get_scale() == 32768
    setup.scaler.load_state_dict({**setup.scaler.state_dict(), "scale": 64.0})
    take_step(setup, batch)
    assert setup.hooks.steps == 1, "control: no step is ever taken"


def test_the_average_follows_the_steps(tiny: Tiny):
    setup, batch = in_float64(tiny(SGD, "train.ema=0.6", "feedback=[{rule: dfa}]"))
    assert setup.average is not None
    plain = models.build("paper/mnist", image_size=8)
    assert setup.evaluated.state_dict().keys() == plain.state_dict().keys()
    expected = weights(setup)
    for t in range(12):
        take_step(setup, batch)
        decay = min(0.6, (1 + t) / (10 + t))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights(setup).items()}
    torch.testing.assert_close({n: v.detach() for n, v in setup.average.model.named_parameters()}, expected)
    assert far(expected, weights(setup)), "control: the average is the last weights"


def test_a_batch_that_can_not_be_divided_so_often_is_one_line(tiny: Tiny):
    with pytest.raises(InputError, match="train.accumulate=33 can not divide a batch of 32 images"):
        prepare(tiny("train.accumulate=33"))


def test_the_model_is_told_the_labels_of_each_pass(tiny: Tiny):
    setup, batch = in_float64(tiny("feedback=[{rule: drtp}]", "train.accumulate=3"))
    take_step(setup, batch)
    found = {name: p.grad for name, p in setup.model.named_parameters()}
    other, _ = in_float64(tiny("feedback=[{rule: drtp}]"))
    model = other.model
    with targets(model, batch.labels):
        F.cross_entropy(model(batch.images), batch.labels).backward()
    torch.testing.assert_close(found, {n: p.grad for n, p in model.named_parameters()}, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["bp", "fa", "drtp"])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_mean_is_that_of_the_files_that_were_not_skipped(tiny: Tiny, rule: str, passes: int):
    skip = (f"feedback=[{{rule: {rule}}}]", "data.corrupt=skip")
    setup, batch = in_float64(tiny(*skip, f"train.accumulate={passes}"))
    valid = torch.tensor([True, False, True, True, True, False, True])
    loss, _, count = found_by_a_step(setup, replace(batch, valid=valid))
    model = in_float64(tiny(*skip))[0].model
    with targets(model, batch.labels[valid]):
        by_hand = F.cross_entropy(model(batch.images[valid]), batch.labels[valid])
    by_hand.backward()
    gradients = {name: p.grad for name, p in setup.model.named_parameters()}
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    assert count == 5
    assert loss / 5 == pytest.approx(by_hand.item())
    counted = loss_of(setup, setup.model, batch.images, batch.labels.masked_fill(~valid, IGNORED), count=batch.count)[0]
    assert counted.item() < 0.8 * by_hand.item(), "control: skipped files are counted"


def test_a_batch_of_which_all_files_were_skipped_has_no_gradient(tiny: Tiny):
    setup, batch = in_float64(tiny("data.corrupt=skip"))
    assert found_by_a_step(setup, replace(batch, valid=torch.zeros(7, dtype=torch.bool))) == (0, 0, 0)
    assert all((p.grad == 0).all() for p in setup.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("rule", ["fa", "drtp"])
def test_examples_that_only_fill_up_change_nothing(tiny: Tiny, rule: str):
    options = (SGD, f"feedback=[{{rule: {rule}}}]", "train.label_smoothing=0.1", "train.accumulate=2")
    setup, batch = in_float64(tiny(*options))
    valid = torch.tensor([True, False, True, True, True, False, True])
    loss, *counts = found_by_a_step(setup, replace(batch, valid=valid, count=5))
    other, _ = in_float64(tiny(*options))
    few = Batch(batch.images[valid], batch.labels[valid], batch.index[valid], valid[valid], 5)
    expected_loss, *expected_counts = found_by_a_step(other, few)
    torch.testing.assert_close(weights(setup), weights(other), rtol=1e-10, atol=1e-12)
    assert loss == pytest.approx(expected_loss)
    assert counts == expected_counts
    whole, _ = in_float64(tiny(*options))
    take_step(whole, batch)
    assert far(weights(whole), weights(setup)), "control: the examples would change something"
