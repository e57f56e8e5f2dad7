from __future__ import annotations

from typing import Any

import pytest
import torch

from fahooks.data import Augment, Dataset, Files, Images, choice, choose_loader
from fahooks.plugins import loaders

ARRAYS = Dataset("x", *(Images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.zeros(5).long()),) * 2, classes=1)
FILES = Dataset("x", Files(["a"] * 90, torch.zeros(90), side=10), Files(["b"] * 10, torch.zeros(10), side=10), classes=1)
BYTES = 3 * 10 * 10  # of an image


class Absent:
    @staticmethod
    def available() -> str | None:
        return "ffcv is not installed: pip install ffcv"


class Present:
    @staticmethod
    def available() -> str | None:
        return None


@pytest.fixture
def ffcv(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whether ffcv is there."""
    entries = {**loaders._loaded()}
    monkeypatch.setattr(loaders, "_entries", entries)

    def put(target: Any) -> None:
        entries.pop("ffcv", None)
        if target is not None:
            loaders.register("ffcv")(target)

    return put


def chosen(dataset: Dataset, free: int, monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> tuple[str, str]:
    monkeypatch.setattr(choice, "free_bytes", lambda device="cpu": free)
    return choose_loader(dataset, Augment(), limit=limit, device="cpu")


def test_arrays_are_in_memory_anyway(monkeypatch: pytest.MonkeyPatch):
    assert chosen(ARRAYS, 0, monkeypatch) == ("memory", "its images are arrays, which are in memory anyway")


def test_files_go_into_memory_if_they_take_no_more_than_half_of_it(monkeypatch: pytest.MonkeyPatch, ffcv: Any):
    ffcv(Present)
    assert chosen(FILES, 200 * BYTES, monkeypatch)[0] == "memory"
    assert chosen(FILES, 200 * BYTES - 1, monkeypatch)[0] == "ffcv"
    assert chosen(FILES, 100 * BYTES, monkeypatch, limit=40)[0] == "memory", "40 to train on and 10 to test on"
    assert chosen(FILES, 100 * BYTES - 1, monkeypatch, limit=40)[0] == "ffcv"


@pytest.mark.parametrize(
    ("target", "name", "reason"),
    [
        (Present, "ffcv", "decoded, its 100 images take 0.00 GB, and 0.00 GB are free, of which it would take more than half"),
        (Absent, "torchvision", "ffcv would be faster, but: ffcv is not installed: pip install ffcv"),
        (None, "torchvision", "ffcv would be faster, but: it is not part of this version"),
    ],
)
def test_files_that_do_not_fit_are_read_from_disk(
    monkeypatch: pytest.MonkeyPatch, ffcv: Any, target: Any, name: str, reason: str
):
    ffcv(target)
    found, why = chosen(FILES, 100, monkeypatch)
    assert found == name and why.endswith(reason)
