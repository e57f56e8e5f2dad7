"""Streams that decode with threads while the network works."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from torch import Tensor

from fahooks.data.examples import Examples, Images
from fahooks.data.loader import Stream, View
from fahooks.data.order import Share

MOST_WORKERS = 16


class Abandoned(Exception):
    """Nobody waits for these images any more."""


class ThreadedStream(Stream):
    """Batches decoded by threads, which are at most one batch each ahead of whoever reads.

    A batch is the work of one thread, and batches are handed out in their order: what they hold does not depend on how many
    threads there are. Decoding does not hold Python's lock.

    Arguments:
        workers: how many threads.
    """

    def __init__(self, examples: Examples, view: View, *, workers: int) -> None:
        super().__init__(examples, view)
        self.workers = workers

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        """Decoded and framed by threads, then moved and augmented on the training device."""
        stopped = Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="fahooks-decode")
        try:
            work = (pool.submit(self._load, share, self.epoch, stopped) for share in shares)
            for share, pixels in _in_order(work, ahead=self.workers):
                here = pixels.to(self.labels.device, non_blocking=True)
                yield share, self.augment(here, share.index, framed=self.framing is not None)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _load(self, share: Share, epoch: int, stopped: Event) -> tuple[Share, Tensor]:
        """A batch, on the CPU and of one size."""
        source = self.examples.source
        if isinstance(source, Images) and self.framing is None:
            pixels = source.pixels[self.examples.places[share.index]]
        else:
            images = []
            for place in share.index.tolist():
                if stopped.is_set():
                    raise Abandoned
                images.append(self.read(place))
            share, pixels = self.framed(share, images, epoch)
        return share, pixels.pin_memory() if self.labels.is_cuda else pixels


def _in_order(work: Iterator[Future[tuple[Share, Tensor]]], ahead: int) -> Iterator[tuple[Share, Tensor]]:
    """The results of `work`, of which `ahead` are under way at any time."""
    waiting: deque[Future[tuple[Share, Tensor]]] = deque()
    for future in work:
        waiting.append(future)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """Cores of this process: those that it may use, shared between the processes that torchrun started beside it."""
    return max(1, min(MOST_WORKERS, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
