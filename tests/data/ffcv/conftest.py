from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fahooks.data import Files, Images
from fahooks.data.ffcv import library

MISSING = library.missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is beside this file where FFCV is not."""
    here = Path(__file__).parent
    for item in items:
        if MISSING and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=MISSING))


def arrays(count: int, channels: int = 3, side: int = 8) -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 10)


@pytest.fixture
def color() -> Images:
    return arrays(50)


@pytest.fixture
def gray() -> Images:
    return arrays(40, channels=1)


@pytest.fixture
def photographs(tmp_path: Path) -> Files:
    """Twelve smooth images of as many sizes: JPEG files, a gray one among them, and one PNG."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    paths = []
    for number in range(12):
        small = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)).numpy()
        image = Image.fromarray(small).resize((40 + number, 60 - number), Image.Resampling.BICUBIC)
        path = folder / (f"{number}.png" if number == 5 else f"{number}.jpg")
        (image.convert("L") if number == 7 else image).save(path, quality=95)
        paths.append(str(path))
    return Files(paths, torch.arange(12), side=32)
