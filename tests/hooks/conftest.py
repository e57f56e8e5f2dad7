from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fahooks


class Net(nn.Module):
    """A grouped convolution and two linear layers, on [N, 4, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.dense = nn.Linear(24, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.dense(self.conv(x).relu().flatten(1)).relu())


@pytest.fixture
def net() -> Callable[..., Net]:
    """A network of a given seed and rule; None leaves it plain."""

    def make(rule: str | None = "fa", seed: int = 0) -> Net:
        torch.manual_seed(seed)
        model = Net()
        if rule is not None:
            fahooks.convert(model, rule)
        return model

    return make


@pytest.fixture
def learn() -> Callable[..., None]:
    """`learn(model, optimizer, steps, scaler)`: that many steps on one batch, the same each time."""

    def go(model: Net, optimizer: torch.optim.Optimizer, steps: int = 3, scaler: torch.amp.GradScaler | None = None) -> None:
        weight = model.output.weight
        x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
        labels = torch.tensor([0, 1, 2, 0, 1])
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

    return go
