"""How long a training step takes by each rule, beside plain backpropagation.

All contestants live in one process and take turns, in an order that is rotated from round to round; at its turn each takes two
steps, of which the second is timed. They train the same weights, in the same memory, since copies are slower or faster by where
they happen to lie. Every time is compared with that of backpropagation in the same round. A second contestant with
backpropagation, the A/A control, shows what a ratio is worth on this machine: where it is not near 1, no other ratio tells
anything.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

from fahooks.hooks import attach
from fahooks.plugins import InputError
from fahooks.rules import targets
from fahooks.surgery import convert, feedback_rules

BASELINE = "backprop"
CONTROL = "backprop again"

WARM_UP = 3
"""Steps before the first one that is timed: matrices are drawn, and compilers compile."""


@dataclass(frozen=True)
class Ratio:
    """Quartiles of the ratios of paired times, over rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Timing:
    """What the steps of one contestant took.

    Attributes:
        name: the rule, or `BASELINE` or `CONTROL`.
        milliseconds: the median time of a step by each clock: "cpu" (time of all threads of the process) and "wall", or "device"
            and "wall" on a GPU.
        ratios: of these times and those of the baseline, by clock.
        state_bytes: what the rules keep, beside the model.
        peak_bytes: the most memory that a step takes, beside what is there before.
    """

    name: str
    milliseconds: dict[str, float]
    ratios: dict[str, Ratio]
    state_bytes: int
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The timing in types that json can write."""
        return asdict(self)


@dataclass
class _Contestant:
    name: str
    step: Callable[[], None]
    state_bytes: Callable[[], int]


def compare(
    make: Callable[[], nn.Module],
    rules: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int = 20,
    compiled: bool = False,
    bf16: bool = False,
) -> list[Timing]:
    """Time a training step, forward, cross-entropy, backward and SGD with momentum, by each rule.

    Set the number of threads, and the seed, before.

    Arguments:
        make: makes the model, with the same weights each time, in training mode, on the device of `images`.
        rules: what `convert` is given, by the name that it is to have in the result.
        images: a batch, what the model is called with.
        labels: class indices int64 [N].
        rounds: how often each contestant takes a step.
        compiled: compile every model with torch.compile, as one graph.
        bf16: run the forward pass under autocast to bfloat16.

    Returns:
        Backpropagation, once more as the control, and the rules in the order given.

    Raises:
        InputError: there is no round.
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")

    weights = make()
    momenta: defaultdict[Tensor, Any] = defaultdict(dict)

    def enter(name: str, rule: Any) -> _Contestant:
        model = make()
        _share(model, weights)
        return _contestant(name, model, momenta, rule, images, labels, compiled=compiled, bf16=bf16)

    contestants = [enter(BASELINE, None), enter(CONTROL, None), *(enter(name, rule) for name, rule in rules.items())]
    for contestant in contestants * WARM_UP:
        contestant.step()
    peaks = [_peak(contestant.step, images.device) for contestant in contestants]
    times: dict[str, dict[str, list[float]]] = {contestant.name: {} for contestant in contestants}
    with _collected():
        for contestant in _turns(contestants, rounds):
            for clock, seconds in _timed(contestant.step, images.device).items():
                times[contestant.name].setdefault(clock, []).append(seconds)
    return [
        Timing(
            name=contestant.name,
            milliseconds={clock: 1000 * statistics.median(taken) for clock, taken in times[contestant.name].items()},
            ratios={clock: _ratio(taken, times[BASELINE][clock]) for clock, taken in times[contestant.name].items()},
            state_bytes=contestant.state_bytes(),
            peak_bytes=peak,
        )
        for contestant, peak in zip(contestants, peaks, strict=True)
    ]


def _share(model: nn.Module, other: nn.Module) -> None:
    """Have a model compute with the parameters and buffers of another one that was made alike."""
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        mine._parameters.update(theirs._parameters)
        mine._buffers.update(theirs._buffers)


def _contestant(
    name: str,
    model: nn.Module,
    momenta: defaultdict[Tensor, Any],
    rule: Any,
    images: Tensor,
    labels: Tensor,
    *,
    compiled: bool,
    bf16: bool,
) -> _Contestant:
    if rule is not None:
        convert(model, rule)
    rules = feedback_rules(model)
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optimizer.state = momenta
    if any(rule.learns for rule in rules.values()):
        attach(model, optimizer)
    forward: Any = model
    precision = torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext()

    def step() -> None:
        with precision, targets(model, labels):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if compiled:
        step()  # direct rules draw their matrices
        forward = torch.compile(model, fullgraph=True)
    return _Contestant(name, step, lambda: sum(rule.memory_bytes for rule in rules.values()))


def _turns(contestants: Sequence[_Contestant], rounds: int) -> Iterator[_Contestant]:
    """Everyone once a round, beginning with another one each time, and every other round backwards."""
    for number in range(rounds):
        first = number // 2 % len(contestants)
        order = [*contestants[first:], *contestants[:first]]
        yield from reversed(order) if number % 2 else order


@contextmanager
def _collected() -> Iterator[None]:
    """Keep Python's garbage collector from what exists already: to look through it takes as long as a step, and the caches."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _timed(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds that a step takes behind another one, by clock. Python's garbage collector waits until they are over.

    In training a step follows one of the same model. Behind a step of another contestant it would find the caches full of that.
    """
    gc.collect()
    gc.disable()
    try:
        step()
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            wall = time.perf_counter()
            begun.record()
            step()
            ended.record()
            torch.cuda.synchronize(device)
            return {"device": begun.elapsed_time(ended) / 1000, "wall": time.perf_counter() - wall}
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    finally:
        gc.enable()


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that torch holds during a step, beside those that it holds before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = cast(Any, watched).profiler.kineto_results.events()
    most = held = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    ratios = [mine / theirs for mine, theirs in zip(times, baseline, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    return Ratio(*statistics.quantiles(ratios, n=4, method="inclusive"))
