"""`python reading.py RECIPE CASES OUT`, or by torchrun: train a recipe in float64 once for each of a JSON file's overrides.

Each rank notes which examples of the test set it evaluates, and which .beton files it writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import in_float64  # noqa: F401  # registers its model
import torch

from fahooks.data.ffcv import loader as ffcv
from fahooks.recipe import load
from fahooks.training import commands, distributed, loop
from fahooks.training.setup import prepare


def main(recipe: str, cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    loop._plot = lambda run: None  # half of the time of such short runs
    written: list[str] = []
    write = ffcv.write

    def noted(path: Path, *arguments: Any, **options: Any) -> None:
        written.append(path.name)
        write(path, *arguments, **options)

    ffcv.write = noted
    with distributed.joined():
        for name, overrides in json.loads(cases.read_text()).items():
            commands.start(recipe, overrides, out / name)
            test = prepare(load(recipe, overrides)).test
            evaluated = [place for batch in test for place in batch.index[batch.valid].tolist()]
            document = {"evaluated": evaluated, "images": test.images, "written": written}
            (out / f"{name}-{distributed.rank()}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
