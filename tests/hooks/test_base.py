from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import fahooks
from fahooks import plugins
from fahooks.plugins import InputError
from fahooks.recipe import RecipeError, Source, load
from fahooks.training.setup import prepare


@pytest.fixture
def ceiling(monkeypatch: pytest.MonkeyPatch) -> type[fahooks.Hook]:
    """A hook as the author of a plugin writes it."""
    monkeypatch.setattr(plugins.hooks, "_entries", dict(plugins.hooks._entries))

    @fahooks.register_hook("ceiling", paper="none")
    class Ceiling(fahooks.Hook):
        """abs(W) <= ceiling after each step."""

        def __init__(self, *, ceiling: float = 1.0, match: Any = None) -> None:
            super().__init__(match=match)
            self.ceiling = ceiling

        def after_step(self, weights: Mapping[str, nn.Parameter]) -> None:
            for weight in weights.values():
                weight.clamp_(-self.ceiling, self.ceiling)

    return Ceiling


RECIPE = """\
name: tiny
model: {name: paper/mnist}
feedback: [{rule: fa}]
hooks: [{name: ceiling, ceiling: 0.01, match: [dense, "conv*"]}]
data: {dataset: digits, batch_size: 32, validation: 60, limit: 120}
optim: {name: adam, lr: 5e-4}
train: {epochs: 1, device: cpu}
"""


def test_a_plugin_hook_is_used_in_python_and_in_recipes(
    ceiling: type[fahooks.Hook], net: Callable[..., Any], learn: Callable[..., None]
):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert model.dense.weight.abs().max() > 0.05, "control"
    fahooks.attach(model, optimizer, {"name": "ceiling", "ceiling": 0.05})
    learn(model, optimizer, 1)
    assert all(layer.weight.abs().max().item() == pytest.approx(0.05) for layer in (model.conv, model.dense, model.output))

    with torch.random.fork_rng():
        setup = prepare(load(Source("r.yaml", RECIPE)))
    batch = next(iter(setup.train))
    nn.functional.cross_entropy(setup.forward(batch.images), batch.labels).backward()
    setup.optimizer.step()
    largest = {name: setup.model.get_parameter(f"{name}.weight").abs().max().item() for name in ("conv1", "dense", "output")}
    assert largest["conv1"] == largest["dense"] == pytest.approx(0.01) and largest["output"] > 0.05
    with pytest.raises(
        RecipeError, match=r"hooks.0.ceilling: hook 'ceiling' has no such option \(got 2\) - did you mean 'ceiling'"
    ):
        load(Source("r.yaml", RECIPE), ["hooks=[{name: ceiling, ceilling: 2}]"])


def test_a_hook_that_does_nothing_is_refused(net: Callable[..., Any]):
    class Misspelt(fahooks.Hook):
        def afterstep(self, weights: Mapping[str, nn.Parameter]) -> None:
            """Meant to be after_step."""

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for hook in (Misspelt, Misspelt()):
        with pytest.raises(
            InputError, match=r"^hook 'Misspelt' does nothing: of a fahooks.Hook's methods before_step\(weights\)"
        ):
            fahooks.attach(model, optimizer, hook)
    assert not optimizer._optimizer_step_pre_hooks


def test_every_hook_describes_itself():
    assert fahooks.list_hooks() == ["alignment", "constant_norm", "dale", "freeze_signs", "manhattan"]
    for entry in plugins.hooks:
        assert entry.summary and "https://" in entry.paper
        assert "match" in entry.options


def test_state_is_kept_under_any_layer_name():
    hook = fahooks.Hook()
    values = {name: torch.tensor(float(i)) for i, name in enumerate(["", "match", "training", "a.b", "a", "forward"])}
    for name, value in values.items():
        hook.remember(name, value)
    assert all(hook.recall(name) is value for name, value in values.items())
    assert "/a/b" in hook.state_dict() and len(hook.state_dict()) == len(values)
