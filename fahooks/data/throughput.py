"""How fast loaders are: images per second, and per second of CPU time, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from fahooks.data.loader import Stream


@dataclass(frozen=True)
class Throughput:
    """What was measured of a loader.

    Arguments:
        loader: its name.
        opening: seconds from asking for a stream to its first batch, when all that it writes was written.
        per_second: images a second in each round.
        per_cpu_second: images a second of CPU time, of all threads of the process, in each round.
    """

    loader: str
    opening: float
    per_second: list[float]
    per_cpu_second: list[float]

    def as_dict(self) -> dict[str, object]:
        """For JSON: the medians, and all rounds."""
        return {
            "loader": self.loader,
            "opening": self.opening,
            "images_per_second": median(self.per_second),
            "images_per_cpu_second": median(self.per_cpu_second),
            "rounds": {"images_per_second": self.per_second, "images_per_cpu_second": self.per_cpu_second},
        }


def measure(streams: Mapping[str, Stream], opening: Mapping[str, float], *, rounds: int, seconds: float) -> list[Throughput]:
    """Read batches from each stream in turns.

    Arguments:
        streams: an opened stream for each loader.
        opening: how long opening took, for each.
        rounds: how many turns each gets.
        seconds: how long a turn is at least; it ends with an epoch.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    epoch = 1
    for _ in range(rounds):
        for name, stream in streams.items():
            images, started, used = 0, time.perf_counter(), time.process_time()
            while (passed := time.perf_counter() - started) < seconds or images == 0:
                epoch += 1
                stream.set_epoch(epoch)
                images += sum(len(batch.labels) for batch in stream)
                if stream.labels.is_cuda:
                    torch.cuda.synchronize(stream.labels.device)
            passed = time.perf_counter() - started
            found[name].append((images / passed, images / (time.process_time() - used)))
    return [Throughput(name, opening[name], *map(list, zip(*found[name], strict=True))) for name in streams]
