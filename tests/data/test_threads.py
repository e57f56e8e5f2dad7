from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fahooks.data import Examples, Files, View, threads
from fahooks.data.threads import ThreadedStream, own_cores


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Thirteen black images."""
    paths = [str(tmp_path / f"{number}.png") for number in range(13)]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    return Files(paths, torch.arange(13), side=16)


def opened(files: Files, *, batch_size: int, workers: int) -> ThreadedStream:
    view = View(batch_size=batch_size, training=True, mean=torch.zeros(3), std=torch.ones(3))
    return ThreadedStream(Examples("x", files, torch.arange(13)), view, workers=workers)


def test_no_more_is_decoded_ahead_than_there_are_workers(files: Files, monkeypatch: pytest.MonkeyPatch):
    begun: list[int] = []

    class Pool(threads.ThreadPoolExecutor):
        def submit(self, *args: Any, **options: Any) -> Any:
            begun.append(1)
            return super().submit(*args, **options)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    batches = iter(opened(files, batch_size=1, workers=2))
    for given in (1, 2, 3):
        next(batches)
        assert len(begun) == given + 2
    assert len(list(batches)) == 10 and len(begun) == 13


def test_threads_end_with_the_epoch_and_with_who_stops_early(files: Files):
    stream = opened(files, batch_size=4, workers=3)
    before = threading.active_count()
    for _ in stream:
        assert threading.active_count() > before
        break
    assert threading.active_count() == before
    list(stream)
    assert threading.active_count() == before


def test_a_batch_that_nobody_waits_for_any_more_is_left_where_it_is(files: Files, monkeypatch: pytest.MonkeyPatch):
    """Of batches of 6, 6 and 1 images the first is given; the stream is closed while the second is at its second image."""
    stream = opened(files, batch_size=6, workers=1)
    begun, closing = threading.Event(), threading.Event()
    read: list[int] = []
    inner = stream.read

    def slow(place: int) -> torch.Tensor | None:
        read.append(place)
        if len(read) == 8:
            begun.set()
            assert closing.wait(60)
        return inner(place)

    class Pool(threads.ThreadPoolExecutor):
        def shutdown(self, *args: Any, **options: Any) -> None:
            closing.set()
            super().shutdown(*args, **options)

    monkeypatch.setattr(stream, "read", slow)
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    batches = iter(stream)
    next(batches)
    assert begun.wait(60)
    stream.close()
    assert len(read) == 8


def test_workers_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert own_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own_cores() == 1
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(512)), raising=False)
    assert own_cores() == 16
