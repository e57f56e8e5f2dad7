"""`python in_float64.py RECIPE CASES OUT`, or by torchrun: train a recipe in float64 once for each of a JSON file's overrides.

`in_float64.py RUN resume OUT` goes on with a run instead.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fahooks.plugins import InputError, models
from fahooks.training import commands, distributed, loop, torchrun


@models.register("in_float64", summary="Two convolutions and two linear maps, for images of 8x8 pixels in float64.")
class InFloat64(nn.Module):
    """Where it is to `overflow`, the first two steps get infinite gradients for a unit that, sharded, one process alone has."""

    def __init__(self, classes: int = 10, norm: bool = False, overflow: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.Tanh()),
            nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Tanh()),
        )
        self.head = nn.Linear(16, classes)
        self.double()
        if overflow:
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
            self.blocks[0].register_forward_hook(self._overflow)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images.double()))

    def _overflow(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        self.passes += self.training
        if self.training and self.passes <= 2:
            output.register_hook(lambda error: error.index_fill(1, torch.tensor([0]), torch.inf))


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop._plot = lambda run: None  # half of the time of such short runs
    torch.compile = partial(torch.compile, backend="aot_eager")  # all of it but for writing and compiling C++
    recipe, cases, out = sys.argv[1:]
    with distributed.joined():
        if cases == "resume":
            commands.resume(Path(recipe))
        for name, overrides in json.loads(Path(cases).read_text()).items() if cases != "resume" else ():
            try:
                line = commands.start(recipe, overrides, Path(out) / name)
            except InputError as error:
                line = str(error)
            if distributed.rank() == 0:
                (Path(out) / f"{name}.txt").write_text(line)
    if torchrun.started_by_torchrun():
        torchrun.leave(0)
