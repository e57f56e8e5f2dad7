from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import FeedbackAlignment

Net = Callable[..., Any]
Learn = Callable[..., None]

CHANGE_NORMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


class Recorder(fahooks.Hook):
    """Notes what it is called with."""

    def __init__(self, *, match: Any = None) -> None:
        super().__init__(match=match)
        self.calls: list[tuple[str, int]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        assert not torch.is_grad_enabled()
        self.calls.append(("before", self.steps))
        self.gradients.append({name: w.grad.clone() for name, w in weights.items() if w.grad is not None})

    def after_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        assert not torch.is_grad_enabled()
        self.calls.append(("after", self.steps))


class Learner(FeedbackAlignment):
    """A rule that learns, which notes what it is called with."""

    learns = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.gradient: Tensor | None = None

    def attach(self, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("attach")

    def before_step(self, weight: nn.Parameter) -> None:
        self.calls.append("before")
        self.gradient = None if weight.grad is None else weight.grad.clone()

    def after_step(self, weight: nn.Parameter) -> None:
        self.calls.append("after")

    def detach(self, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("detach")


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def acted_on(model: nn.Module, optimizer: torch.optim.Optimizer, match: Any = None) -> list[str]:
    handle = fahooks.attach(model, optimizer, Recorder(match=match))
    ((_, found),) = handle.hooks
    handle.remove()
    return list(found)


def test_a_hook_is_a_name_a_class_an_object_or_a_mapping(net: Net, learn: Learn):
    results = []
    forms = ("alignment", fahooks.Alignment, fahooks.Alignment(), {"name": "alignment", "strength": 0.001})
    for hook in (*forms, {"name": "alignment", "strength": 1.0}):
        model = net()
        optimizer = sgd(model)
        handle = fahooks.attach(model, optimizer, hook, seed=3)
        learn(model, optimizer)
        assert handle.steps == 3
        results.append(weights(model))
    assert all(same(results[0], other) for other in results[1:4])
    assert not same(results[0], results[4]), "control"


def test_options_of_a_single_hook_may_stand_beside_it(net: Net, learn: Learn):
    results = []
    for hooks, options in (
        ([{"name": "alignment", "strength": 1.0}], {}),
        (["alignment"], {"strength": 1.0}),
        ([fahooks.Alignment], {"strength": 1}),
        ([{"name": "alignment"}], {"strength": 1.0}),
        (["alignment"], {}),
    ):
        model = net()
        optimizer = sgd(model)
        fahooks.attach(model, optimizer, *hooks, seed=3, **options)  # pyright: ignore[reportArgumentType]
        learn(model, optimizer)
        results.append(weights(model))
    assert all(same(results[0], other) for other in results[1:4])
    assert not same(results[0], results[4]), "control"
    for hooks in ([], ["alignment", "manhattan"], [fahooks.Alignment()]):
        with pytest.raises(InputError, match="^strength: options can stand here where one hook is given"):
            fahooks.attach(net(), sgd(net()), *hooks, strength=1.0)


@pytest.mark.parametrize("rule", fahooks.list_rules())
def test_a_loop_over_rules_attaches_each(rule: str, net: Net, learn: Learn):
    model = net(None)
    fahooks.convert(model, rule)
    optimizer = sgd(model)
    handle = fahooks.attach(model, optimizer)
    assert bool(handle.rules) is (rule in ("kp", "wm"))
    if handle.rules:
        with pytest.raises(InputError, match="^nothing to attach: no hook is given, and this optimizer updates no weight beside"):
            fahooks.attach(model, sgd(nn.Linear(2, 2)))
    elif rule not in ("drtp",):
        learn(model, optimizer)
        assert handle.steps == 3
    handle.remove()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": "x"}, "total_steps must be a whole number, got 'x'"),
        ({"total_steps": 0}, "total_steps must be a positive number, got 0"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"time_constant": "x"}, r"hook 'constant_norm': time_constant must be a number \(got 'x'\)"),
        ({"tim_constant": 5}, "hook 'constant_norm' has no option 'tim_constant' - did you mean 'time_constant'"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str, net: Net):
    model = net()
    with pytest.raises(InputError, match=message):
        fahooks.attach(model, sgd(model), "constant_norm", **arguments)


@pytest.mark.parametrize("state", [{"a": 1}, {}, [], None, {"steps": "x", "names": [], "hooks": []}], ids=str)
def test_what_is_no_state_is_refused(state: Any, net: Net):
    model = net()
    with pytest.raises(InputError, match="^this is no state of what attach returns"):
        fahooks.attach(model, sgd(model), "manhattan").load_state_dict(state)


def test_hooks_run_in_order_around_every_step(net: Net, learn: Learn):
    model, plain = net(), net()
    optimizer = sgd(model)
    first, second = Recorder(), Recorder(match="dense")
    fahooks.attach(model, optimizer, first, "manhattan", second)
    learn(model, optimizer, 2)
    assert first.calls == second.calls == [("before", 0), ("after", 1), ("before", 1), ("after", 2)]
    learn(plain, sgd(plain), 1)
    assert list(first.gradients[0]) == ["conv", "dense", "output"] and list(second.gradients[0]) == ["dense"]
    assert torch.equal(first.gradients[0]["dense"], plain.dense.weight.grad)
    assert torch.equal(second.gradients[0]["dense"], plain.dense.weight.grad.sign())


def test_removed_hooks_leave_a_plain_optimizer(net: Net, learn: Learn):
    model, plain, held = net(), net(), net()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, plain, held)]
    handle = fahooks.attach(model, optimizers[0], "manhattan", "constant_norm", "alignment", fahooks.FreezeSigns(after=0))
    fahooks.attach(held, optimizers[2], "manhattan")
    handle.remove()
    handle.remove()
    for m, optimizer in zip((model, plain, held), optimizers, strict=True):
        learn(m, optimizer)
    assert same(weights(model), weights(plain))
    assert not same(weights(held), weights(plain)), "control"


def test_detach_takes_off_what_has_no_handle_any_more(net: Net, learn: Learn):
    model, plain, held = net("kp"), net(), net("kp")
    fahooks.convert(plain, "bp")
    fahooks.convert(held, "bp")
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, plain, held)]
    others: list[int] = []
    optimizers[0].register_step_pre_hook(lambda *_: others.append(1))
    fahooks.attach(model, optimizers[0], "manhattan")
    fahooks.attach(held, optimizers[2], "manhattan")
    fahooks.detach(optimizers[0])
    fahooks.detach(optimizers[0])
    fahooks.convert(model, "bp")
    for m, optimizer in zip((model, plain, held), optimizers, strict=True):
        learn(m, optimizer)
    assert same(weights(model), weights(plain))
    assert not same(weights(held), weights(plain)), "control"
    assert len(others) == 3, "hooks of others stay"
    fahooks.convert(model, "kp")
    fahooks.attach(model, optimizers[0])


def test_parameters_keep_their_identity_and_the_generator_its_state(net: Net, learn: Learn):
    model = net()
    before = [(id(p), p.data_ptr()) for p in model.parameters()]
    state = torch.get_rng_state()
    optimizer = sgd(model)
    fahooks.attach(model, optimizer, "alignment", "manhattan", fahooks.Dale(excitatory=0.5), "constant_norm")
    learn(model, optimizer)
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", CHANGE_NORMS.values(), ids=CHANGE_NORMS)
def test_any_optimizer_will_do(make: Callable[[Any], torch.optim.Optimizer], net: Net, learn: Learn):
    model, plain = net(), net()
    groups = [{"params": [*model.conv.parameters()]}, {"params": [*model.dense.parameters(), *model.output.parameters()]}]
    optimizer = make(groups)
    start = {layer: layer.weight.norm().item() for layer in (model.conv, model.dense, model.output)}
    signs = {layer: layer.weight.sign() for layer in start}
    recorder = Recorder()
    fahooks.attach(model, optimizer, recorder, fahooks.FreezeSigns(after=0), "constant_norm")
    learn(model, optimizer, 5)
    learn(plain, make(plain.parameters()), 5)
    for (layer, norm), other in zip(start.items(), (plain.conv, plain.dense, plain.output), strict=True):
        assert layer.weight.norm().item() == pytest.approx(norm, rel=1e-6)
        assert torch.equal(layer.weight.sign(), signs[layer])
        assert other.weight.norm().item() != pytest.approx(norm, rel=1e-4), "control"
    assert recorder.steps == 5 and len(recorder.gradients[0]) == 3


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_followed_by_the_gradient_transforms(keyword: bool, net: Net, learn: Learn):
    model, plain = net(), net()
    optimizer, other = sgd(model), sgd(plain)
    for m, o in ((model, optimizer), (plain, other)):
        fahooks.attach(m, o, fahooks.Alignment(strength=0.1), "manhattan")
    learn(plain, other, 2)
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))
        loss.backward()
        return loss.item()

    for _ in range(2):
        assert (optimizer.step(closure=closure) if keyword else optimizer.step(closure)) > 0
    assert same(weights(model), weights(plain))


def test_lbfgs_minimises_the_penalised_loss(net: Net):
    """The closure is called several times a step: each time the penalty's gradient is added once."""

    def minimise(penalised: bool) -> tuple[dict[str, Tensor], Recorder]:
        model = net(None).double()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        recorder = Recorder()
        hooks: list[Any] = [recorder, fahooks.Alignment(strength=0.1)] if penalised else [recorder]
        handle = fahooks.attach(model, optimizer, *hooks)
        x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
        targets = reference_targets(net)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))
            if not penalised:
                loss = loss + 0.1 * sum((model.get_submodule(n).weight - v).square().sum() for n, v in targets.items())
            loss.backward()
            return loss.detach()

        for _ in range(2):
            optimizer.step(closure)
        assert handle.steps == 2
        return weights(model), recorder

    by_hook, recorder = minimise(True)
    by_hand, _ = minimise(False)
    torch.testing.assert_close(by_hook, by_hand, rtol=1e-9, atol=1e-9)
    names = [name for name, _ in recorder.calls]
    assert names.count("after") == 2 and names.count("before") > 4
    assert not torch.allclose(by_hook["dense.weight"], net(None).double().dense.weight, atol=1e-2), "control"


def reference_targets(net: Net) -> dict[str, Tensor]:
    model = net(None).double()
    ((hook, found),) = fahooks.attach(model, sgd(model), "alignment").hooks
    return {name: hook.recall(name) for name in found}


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["not fused", "fused"])


@FUSED
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaled_step_is_that_without_a_scaler(fused: bool, scale: float, unscaled: bool, net: Net, learn: Learn):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        model = net("usf")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        fahooks.attach(model, optimizer, fahooks.Alignment(strength=0.5), Recorder(), fahooks.Manhattan(match="dense"))
        if scaler is not None and unscaled:
            step_unscaled(model, optimizer, scaler)
        else:
            learn(model, optimizer, 1, scaler)
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(results[0]["conv.weight"], net("usf").conv.weight, atol=1e-3), "control: it moved"


def step_unscaled(model: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """One step of `learn` with `scaler.unscale_` before it, as for gradient clipping."""
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    scaler.scale(nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@FUSED
def test_a_step_that_a_scaler_skips_runs_no_hook(fused: bool, net: Net, learn: Learn):
    model = net(None)
    fahooks.convert(model, Learner)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    recorder = Recorder()
    handle = fahooks.attach(model, optimizer, recorder, "manhattan", fahooks.ConstantNorm(time_constant=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    learn(model, optimizer, 1, scaler)
    assert handle.steps == 1 and recorder.calls == [("before", 0), ("after", 1)]
    before = weights(model)
    scaler.scale(model(torch.full((1, 4, 4, 4), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9, "control: the step was skipped"
    assert handle.steps == 1 and len(recorder.calls) == 2
    assert model.conv.feedback.calls == ["attach", "before", "after"]
    assert same(weights(model), before)
    learn(model, optimizer, 1, scaler)
    assert handle.steps == 2 and not same(weights(model), before)


def test_converted_layers_are_acted_on_or_else_all(net: Net):
    mixed = net(None)
    fahooks.convert(mixed, {"conv": "fa", "*": "bp"})
    for model, expected in ((net(), ["conv", "dense", "output"]), (net(None), ["conv", "dense", "output"]), (mixed, ["conv"])):
        assert acted_on(model, sgd(model)) == expected
    assert acted_on(mixed, sgd(mixed), "*") == ["conv", "dense", "output"]
    single = nn.Linear(3, 3)
    assert acted_on(single, sgd(single)) == [""]


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("dense", ["dense"]),
        ("*n*", ["conv", "dense"]),
        (["output", "conv"], ["conv", "output"]),
        (nn.Linear, ["dense", "output"]),
        (re.compile("^o"), ["output"]),
        (lambda name, module: name == "conv", ["conv"]),
    ],
)
def test_match_chooses_layers(match: Any, expected: list[str], net: Net):
    model = net(None)
    fahooks.convert(model, {"conv": "fa"})
    assert acted_on(model, sgd(model), match) == expected


def test_only_what_the_optimizer_updates_is_acted_on(net: Net, learn: Learn):
    model = net()
    model.conv.weight.requires_grad_(False)
    optimizer = sgd(model)
    assert acted_on(model, optimizer) == ["dense", "output"]
    first, second = torch.optim.SGD(model.dense.parameters()), torch.optim.SGD(model.output.parameters())
    assert (acted_on(model, first), acted_on(model, second)) == (["dense"], ["output"])
    with pytest.raises(InputError, match=r"match='output' leaves no weight to act on \(output: this optimizer does not update"):
        acted_on(model, first, ["dense", "output"])


def test_a_computed_weight_is_left_out(net: Net):
    model = net()
    parametrizations.weight_norm(model.dense)
    assert acted_on(model, sgd(model)) == acted_on(model, sgd(model), "*") == ["conv", "output"]
    with pytest.raises(
        InputError, match=r"hook 'Recorder': match='dense' .* \(dense: its weight is computed from other parameters"
    ):
        acted_on(model, sgd(model), "dense")


def test_a_shared_weight_is_acted_on_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert acted_on(model, sgd(model)) == ["0"]
    assert acted_on(model, sgd(model), "1") == ["1"]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["constant_nrom"], "no hook is named 'constant_nrom' - did you mean 'constant_norm'"),
        ([{"name": "alignment", "strenth": 1}], "hook 'alignment' has no option 'strenth' - did you mean 'strength'"),
        ([{"strength": 1}], r"expected \{'name': name, option: value, ...\}, got \{'strength': 1\}"),
        ([3], "a hook must be a name, a Hook class, a Hook or .*, got 3"),
        ([nn.Linear], "a hook must be a name"),
        (
            [fahooks.Manhattan(match="dens")],
            "hook 'manhattan': match: 'dens' matches none of the 3 layers - did you mean 'dense'",
        ),
        ([Recorder(match=3)], "hook 'Recorder': match: expected a name pattern"),
        (2 * [fahooks.Manhattan()], "this Manhattan is attached already"),
        ([fahooks.Dale(), fahooks.FreezeSigns(after=0.5)], "after=0.5 is a fraction of training: give attach total_steps"),
    ],
)
def test_what_can_not_be_attached_is_refused_and_leaves_nothing(hooks: list[Any], message: str, net: Net, learn: Learn):
    model, plain = net(), net()
    optimizer = sgd(model)
    with pytest.raises(InputError, match=message):
        fahooks.attach(model, optimizer, *hooks)
    learn(model, optimizer)
    learn(plain, sgd(plain))
    assert same(weights(model), weights(plain))


def test_models_and_optimizers_that_do_not_fit_are_refused(net: Net):
    model = net()
    with pytest.raises(InputError, match="what follows the model must be a torch.optim optimizer, got Net"):
        fahooks.attach(model, model, "manhattan")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="hook 'manhattan': this model leaves no weight to act on"):
        fahooks.attach(nn.ReLU(), sgd(model), "manhattan")
    with pytest.raises(InputError, match="this model leaves no weight to act on .*this optimizer does not update its weight"):
        fahooks.attach(net(), sgd(model), "manhattan")
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match="layer '0' has no shape yet: run one batch through the model, then attach"):
        fahooks.attach(lazy, sgd(lazy), "manhattan")


def test_a_hook_is_attached_once_at_a_time(net: Net):
    model = net()
    optimizer, hook = sgd(model), fahooks.Manhattan()
    handle = fahooks.attach(model, optimizer, hook)
    with pytest.raises(InputError, match="this Manhattan is attached already: remove"):
        fahooks.attach(model, optimizer, hook)
    fahooks.attach(model, optimizer, "manhattan").remove()
    handle.remove()
    fahooks.attach(model, optimizer, hook)


def test_a_hook_is_free_again_with_the_optimizer_that_it_was_attached_to(net: Net, learn: Learn):
    model = net("kp")
    hook = fahooks.Manhattan()
    optimizer = sgd(model)
    fahooks.attach(model, optimizer, hook)
    with pytest.raises(InputError, match="attached already"):
        fahooks.attach(model, sgd(model), hook)
    del optimizer
    optimizer = sgd(model)
    fahooks.attach(model, optimizer, hook)
    learn(model, optimizer)


def test_a_hook_that_goes_to_another_model_forgets_the_first(net: Net, learn: Learn):
    first, second = net(), nn.Sequential(nn.Linear(5, 3))
    hook = fahooks.ConstantNorm()
    fahooks.attach(first, sgd(first), hook).remove()
    handle = fahooks.attach(second, sgd(second), hook)
    assert list(handle.state_dict()["hooks"][0]) == ["/0"]


def test_rules_that_learn_take_part_in_every_step(net: Net, learn: Learn):
    model = net(None)
    fahooks.convert(model, {"conv": Learner, "output": Learner, "*": "fa"})
    optimizer = torch.optim.SGD([*model.conv.parameters(), *model.dense.parameters()], lr=0.1)
    handle = fahooks.attach(model, optimizer, "manhattan")
    assert list(handle.rules) == ["conv"]
    learn(model, optimizer, 2)
    assert model.conv.feedback.calls == ["attach", "before", "after", "before", "after"]
    assert set(model.conv.feedback.gradient.unique().tolist()) <= {-1.0, 0.0, 1.0}, "the gradient is that after all hooks"
    assert model.output.feedback.calls == []
    with pytest.raises(InputError, match="this Learner is attached already: remove"):
        fahooks.attach(model, optimizer)
    handle.remove()
    assert model.conv.feedback.calls[-1] == "detach"
    assert model.conv.feedback.calls.count("detach") == 1
    fahooks.attach(model, optimizer)
    assert model.conv.feedback.calls[-1] == "attach"


def test_a_rule_that_learns_needs_a_weight_of_its_own(net: Net):
    model = net(None)
    parametrizations.weight_norm(model.dense)
    fahooks.convert(model, {"dense": Learner})
    with pytest.raises(InputError, match="layer 'dense': rule 'Learner' learns beside a weight, and this one is computed"):
        fahooks.attach(model, sgd(model))


def test_state_goes_through_a_file_and_a_run_goes_on_from_it(net: Net, learn: Learn):
    def hooks() -> list[Any]:
        return [fahooks.FreezeSigns(after=4), "alignment", "constant_norm", fahooks.Dale(match="output", excitatory=0.5)]

    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    handle = fahooks.attach(model, optimizer, *hooks())
    learn(model, optimizer, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), handle.state_dict()], file)
    learn(model, optimizer, 5)

    def go_on(restore: bool) -> dict[str, Tensor]:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = net(seed=7)
        again = torch.optim.Adam(other.parameters(), lr=0.05)
        attached = fahooks.attach(other, again, *hooks(), seed=9)
        other.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        if restore:
            attached.load_state_dict(saved[2])
            assert attached.steps == 5
        learn(other, again, 5)
        return weights(other)

    assert same(go_on(restore=True), weights(model))
    assert not same(go_on(restore=False), weights(model)), "control"


def test_the_state_of_other_hooks_is_refused(net: Net):
    model, other = net(), net()
    state = fahooks.attach(model, sgd(model), "alignment").state_dict()
    for hooks in ([fahooks.Alignment(match="dense")], ["alignment", "manhattan"], ["manhattan"]):
        handle = fahooks.attach(other, sgd(other), *hooks)
        with pytest.raises(InputError, match="the state is that of other hooks, or of hooks on other weights"):
            handle.load_state_dict(state)
    fahooks.attach(other, sgd(other), "alignment").load_state_dict(state)


def test_a_handle_prints_what_acts_on_what(net: Net):
    model = net(None)
    fahooks.convert(model, {"conv": Learner, "*": "fa"})
    text = repr(fahooks.attach(model, sgd(model), fahooks.Alignment(match="d*")))
    assert "Alignment(strength=0.001, init='fan_in') on 'dense'" in text
    assert "rule Learner(" in text and "of 'conv'" in text
