"""Random matrices, drawn from private generators: torch's global one is not touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fahooks.rules.base import Rule, check_choice, check_positive


@torch.library.custom_op("fahooks::random_matrix", mutates_args=())
def random_matrix(
    size: Sequence[int], device: torch.device, distribution: str, deviation: float, seed: int, draw: Tensor | None = None
) -> Tensor:
    """A random matrix of mean 0 in float32, a pure function of its arguments.

    One operation, since no compiler traces a generator.

    Arguments:
        size: its shape.
        device: where it is drawn. A GPU draws other numbers than a CPU.
        distribution: "normal" or "uniform".
        deviation: the standard deviation.
        seed: a number below 2^63.
        draw: int64 [], on the CPU: which one of a series of matrices.
    """
    seed = seed if draw is None else (seed + int(draw)) % 2**63
    matrix = torch.empty(size, dtype=torch.float32, device=device)
    fill(matrix, distribution, deviation, torch.Generator(device).manual_seed(seed))
    return matrix


@random_matrix.register_fake
def _(
    size: Sequence[int], device: torch.device, distribution: str, deviation: float, seed: int, draw: Tensor | None = None
) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def draw(
    weight: Tensor,
    *,
    init: str,
    distribution: str,
    gain: float,
    fan_in: int,
    fan_out: int,
    generator: torch.Generator,
) -> Tensor:
    """A random matrix of `weight`'s shape, dtype, device and memory format, with mean 0 and a variance set by the fans.

    Drawn in float32 on the CPU, so that one seed gives one matrix on every device and in every dtype.

    Arguments:
        weight: gives shape, dtype, device and memory format; its values are not read.
        init: variance gain^2 x 1/N_out for "fan_out" (section 5.1 of Moskovitz et al. 2018), 1/N_in for "fan_in",
            2 / (N_in + N_out) for "glorot".
        distribution: "normal" or "uniform".
        gain: factor on the standard deviation.
        fan_in: N_in.
        fan_out: N_out.
        generator: a CPU generator.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """
    check_draw(init, distribution, gain)
    matrix = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    fill(matrix, distribution, deviation(init=init, gain=gain, fan_in=fan_in, fan_out=fan_out), generator)
    return as_weight(matrix, weight)


def as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """A copy of a matrix with dtype, device and memory format of a weight; whole, also where the weight is sharded."""
    layout = torch.empty_strided(weight.shape, weight.stride(), device="meta")
    return torch.empty_like(layout, dtype=weight.dtype, device=weight.device).copy_(matrix)


def fill(matrix: Tensor, distribution: str, deviation: float, generator: torch.Generator) -> None:
    """Fill a matrix in place with numbers of mean 0 and that standard deviation, "normal" or "uniform"."""
    if distribution == "normal":
        matrix.normal_(0, deviation, generator=generator)
    else:
        bound = 3**0.5 * deviation
        matrix.uniform_(-bound, bound, generator=generator)


def seed_of(generator: torch.Generator) -> int:
    """The seed of a generator, below 2^63."""
    return generator.initial_seed() % 2**63


def deviation(*, init: str, gain: float, fan_in: int, fan_out: int) -> float:
    """The standard deviation that `draw` gives a matrix."""
    variances = {"fan_out": 1 / fan_out, "fan_in": 1 / fan_in, "glorot": 2 / (fan_in + fan_out)}
    return gain * variances[init] ** 0.5


def check_draw(init: str, distribution: str, gain: float) -> None:
    """Refuse options that `draw` does not take.

    Raises:
        InputError: an unknown `init` or `distribution`, or a gain that is not positive.
    """
    check_choice("init", init, ("fan_out", "fan_in", "glorot"))
    check_choice("distribution", distribution, ("normal", "uniform"))
    check_positive("gain", gain)


class DrawingRule(Rule):
    """A rule that draws again and again: each matrix is a pure function of seed, layer name and how many went before.

    So every rank draws the same, and a resumed run goes on as it would have.
    """

    seed: int
    draws: Tensor

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Note what is drawn from."""
        self.seed = seed_of(generator)
        # No buffer: it stays on the CPU, where it is read.
        self.draws = torch.zeros((), dtype=torch.int64, device="cpu")

    def next_draw(self, like: Tensor, size: Sequence[int], distribution: str, deviation: float) -> Tensor:
        """The next random matrix of that size, on the device and in the dtype of `like`."""
        self.draws.add_(1)
        return random_matrix(size, like.device, distribution, deviation, self.seed, self.draws).to(like.dtype)

    def get_extra_state(self) -> Tensor:
        """How often was drawn; part of the state_dict."""
        return self.draws.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after that many draws."""
        self.draws.fill_(int(state))
