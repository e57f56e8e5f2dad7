"""Every method trains: the paper's MNIST network on 10,000 real images, to a test error below 10 % within a few epochs.

Slow: `python -m pytest -m slow -s tests/test_methods.py` runs it and prints the numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fahooks import plugins, recipe
from fahooks.training.loop import train
from fahooks.training.run_directory import RunDirectory
from fahooks.training.setup import prepare

# What a method needs beside its name. Targets do not shrink as errors do, so that activations must be bounded. The one channel
# of an image is no unit: under Dale's law all filters of the first layer would have its sign. Signs of gradients are steps.
SETTINGS: dict[str, list[str]] = {
    "drtp": ["model.activation=tanh"],
    "dale": ["hooks=[{name: dale, match: [conv2, dense, output]}]"],
    "manhattan": ["optim={name: sgd, lr: 1.0e-4}"],
}

METHODS = [("feedback", name) for name in plugins.rules.names()] + [("hooks", name) for name in plugins.hooks.names()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), METHODS, ids=[name for _, name in METHODS])
def test_the_method_trains(kind: str, name: str, data_root: Path, tmp_path: Path) -> None:
    rule = name if kind == "feedback" else "usf_init"
    overrides = [
        f"name=methods/{name}",
        f"feedback=[{{match: '*', rule: {rule}}}]",
        f"hooks=[{{name: {name}}}]" if kind == "hooks" else "hooks=[]",
        f"data={{dataset: mnist, root: {data_root}, download: false, batch_size: 50, validation: 1000, limit: 11000}}",
        "optim={name: adam, lr: 5.0e-4, weight_decay: 1.0e-3}",
        "train={epochs: 4, threads: 1, device: cpu}",
        "schedule={name: constant}",
        "probes={}",
        *SETTINGS.get(name, []),
    ]
    source = recipe.find("mnist/bp")
    setup = prepare(recipe.load(source, overrides))
    run = RunDirectory.create(setup.recipe, source, out=tmp_path / "run", overrides=overrides)
    result = train(setup, run, console=Console(quiet=True))
    print(f"{name:14} test error {result.final_test_error:5.2f} % after 4 epochs of 10,000 images")
    assert result.final_test_error < 10
