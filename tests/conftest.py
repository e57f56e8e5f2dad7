"""What all tests share: one thread a process, real data, one step of learning, and an environment that holds the built wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fahooks.rules import workspace

ROOT = Path(__file__).resolve().parent.parent

# Tests run side by side; more threads than cores only slow them down.
torch.set_num_threads(1)
# So does inductor's pool of compiling processes, and one that died fails all tests that follow.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Shapes are tiny, but a busy machine may still stop for longer than the deadline of a single example.
settings.register_profile("fahooks", deadline=None)
settings.load_profile("fahooks")


@pytest.fixture(autouse=True)
def unknown_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sign rules keep memory of their own, whether or not a test before has tuned the allocator."""
    monkeypatch.setattr(workspace._kept, "left_to_allocator", False)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that FAHOOKS_DATA names: real data, laid out as torchvision's dataset classes want it."""
    if "FAHOOKS_DATA" not in os.environ:
        pytest.skip("FAHOOKS_DATA is not set: it names the folder that holds real data, such as MNIST/raw")
    folder = Path(os.environ["FAHOOKS_DATA"]).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"FAHOOKS_DATA names {folder}, which is not a folder")
    return folder


@dataclass(frozen=True)
class Learned:
    """What one forward and one backward pass gave.

    Arguments:
        outputs: every tensor of the model's output.
        gradients: of the inputs ("input 0" ...) and of the parameters, by name; those without one are absent.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    def assert_same_bits(self, other: Learned) -> None:
        """Outputs and gradients are equal to the last bit."""
        torch.testing.assert_close(self.outputs, other.outputs, rtol=0, atol=0)
        torch.testing.assert_close(self.gradients, other.gradients, rtol=0, atol=0)

    def assert_oracle(self, surrogate: Learned, plain: Learned, tolerance: float = 1e-10) -> None:
        """Outputs have the bits of the plain model's, gradients are those of the surrogate, and not those of backpropagation."""
        torch.testing.assert_close(self.outputs, plain.outputs, rtol=0, atol=0)
        torch.testing.assert_close(self.gradients, surrogate.gradients, rtol=tolerance, atol=tolerance)
        assert self.distance(plain) > 1e-2, "control: the gradients are those of backpropagation"

    def distance(self, other: Learned) -> float:
        """The largest difference of a gradient from the other's, relative to that one's norm."""
        assert self.gradients.keys() == other.gradients.keys()
        norms = [((g - other.gradients[n]).norm() / other.gradients[n].norm()).item() for n, g in self.gradients.items()]
        return max(norm for norm in norms if norm == norm)


def _learn(
    model: nn.Module, *inputs: Any, around: Callable[[], AbstractContextManager[Any]] = nullcontext, **options: Any
) -> Learned:
    model.zero_grad()
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), inputs)
    torch.manual_seed(0)
    with around():
        outputs = [leaf for leaf in pytree.tree_leaves(model(*inputs, **options)) if isinstance(leaf, Tensor)]
    torch.stack([(output.double() * torch.randn_like(output.double())).sum() for output in outputs]).sum().backward()
    leaves = {**{f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}, **dict(model.named_parameters())}
    gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    return Learned([output.detach() for output in outputs], gradients)


@pytest.fixture(scope="session")
def learn() -> Callable[..., Learned]:
    """`learn(model, *inputs, around=context, **options)`: one pass each way, the forward one inside `around()`, seeded alike."""
    return _learn


@dataclass(frozen=True)
class Installed:
    """A virtual environment outside the checkout that holds the built wheel and nothing of the checkout.

    Arguments:
        wheel: the wheel that was built.
        bin: the folder of the environment's commands.
        elsewhere: an empty folder that the commands run in.
    """

    wheel: Path
    bin: Path
    elsewhere: Path

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment; neither the checkout nor this process's environment is on its path."""
        return subprocess.run(
            [self.bin / command, *arguments],
            cwd=self.elsewhere,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            capture_output=True,
            text=True,
            check=False,
        )

    def install(self, *arguments: str | Path) -> None:
        """Install with uv."""
        _uv("pip", "install", "--python", self.bin / "python", *arguments)

    def uninstall(self, package: str) -> None:
        """Uninstall with uv."""
        _uv("pip", "uninstall", "--python", self.bin / "python", package)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of this tree in a fresh environment. Tests that use it are in the xdist group `installed`: it is made once."""
    place = tmp_path_factory.mktemp("installed")
    source, elsewhere = place / "source", place / "elsewhere"
    elsewhere.mkdir()
    # A copy, since a build leaves files behind; and only what it needs, so that nothing else can get into the wheel.
    for folder in ("fahooks", "cli", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    _uv("build", "--quiet", "--wheel", "--out-dir", place, source)
    (wheel,) = place.glob("*.whl")
    _uv("venv", "--quiet", "--python", sys.executable, place / "venv")
    environment = Installed(wheel=wheel, bin=place / "venv" / "bin", elsewhere=elsewhere)
    # Symlinks into uv's cache work across file systems too, where gigabytes would have to be copied.
    environment.install("--link-mode", "symlink", "--constraint", ROOT / "constraints.txt", wheel)
    return environment


def _uv(*arguments: str | Path) -> None:
    command = [Path(sys.executable).with_name("uv"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
