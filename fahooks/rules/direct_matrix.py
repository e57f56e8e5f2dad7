"""The feedback matrix of direct rules: from every unit of a source to every unit of a layer's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from fahooks.plugins import InputError
from fahooks.rules.base import Layout, check_choice
from fahooks.rules.drawing import check_draw, deviation, random_matrix

Shape: TypeAlias = tuple[int, int, int]
"""[N, C, P]: samples, channels and positions."""

FEEDBACK = ("dense", "channel", "seeded")

SLICE = 2**22
"""How many entries of a matrix are drawn at once."""


class DirectMatrix(nn.Module):
    """B [units, sources], random and fixed: sends an error e [N, sources] as B e to the units of a layer's input.

    It is drawn when the sizes are first known, in slices that each have a seed of their own.

    Arguments:
        seed: what it is drawn from.
        feedback: "dense" keeps B. "channel" gives all positions of a channel one value: B [channels, source channels], applied
            to the sum over positions; the variance is that of the dense matrix. "seeded" keeps nothing, and draws the
            slices of the dense B anew at each use: on a CPU the same ones, on a GPU by its own generator. But for the positions
            of "channel", sizes must stay those of the first use.
        init: variance of B, gain^2 x 1/sources for "fan_out", 1/units for "fan_in", 2 / (units + sources) for "glorot".
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.

    Raises:
        InputError: an unknown choice, or a gain that is not positive.
    """

    values: Tensor | None = None
    """B, where it is kept, once it was drawn. In the state_dict, and yet no buffer: classes that average models pair those of two
    copies, of which one may not have drawn."""

    def __init__(self, seed: int, *, feedback: str, init: str, distribution: str, gain: float) -> None:
        super().__init__()
        check_choice("feedback", feedback, FEEDBACK)
        check_draw(init, distribution, gain)
        self.seed = seed
        self.feedback = feedback
        self.init = init
        self.distribution = distribution
        self.gain = gain
        self.sizes: tuple[int, int] | None = None

    def forward(self, error: Tensor, shape: Shape, *, channels_last: bool = False, turned: bool = False) -> Tensor:
        """B e for a batch, cast to the dtype of e.

        Arguments:
            error: e, [N, C, P]: samples, channels and positions of the source.
            shape: [N, C, P] of the layer's input.
            channels_last: whether the units, of which each has a row of the dense B, are numbered position by position, as they
                then lie in memory, and not channel by channel.
            turned: whether they lie position by position though they are numbered channel by channel, as in
                `torch.channels_last`. B is turned, or the signals, whichever are fewer numbers.

        Returns:
            The signal for the layer's input, of that shape.

        Raises:
            InputError: the sizes are not those that B was drawn for.
        """
        samples, channels, positions = shape
        if self.feedback == "channel":
            summed = error.sum(2) @ self._kept(error, shape).t()
            return summed.unsqueeze(2).expand(shape)
        flat = error.reshape(samples, -1)
        by_position = channels_last
        if self.feedback == "dense":
            matrix = self._kept(error, shape)
            if turned and flat.shape[1] < samples:
                matrix, by_position = matrix.view(channels, positions, -1).transpose(0, 1).reshape(matrix.shape), True
            signal = flat @ matrix.t()
        else:
            self._check_sizes(error, shape)
            signal = flat.new_empty(samples, channels * positions)
            for start, stop, rows in self._slices(error, shape, error.device):
                torch.matmul(flat, rows.to(flat.dtype).t(), out=signal[:, start:stop])
        if by_position:
            return signal.view(samples, positions, channels).transpose(1, 2)
        signal = signal.view(shape)
        return signal.transpose(1, 2).contiguous().transpose(1, 2) if turned else signal

    def prepare(self, error: Tensor, shape: Shape) -> None:
        """Draw the matrix if it is to be kept and was not drawn yet; of an error only its sizes, dtype and device are read."""
        if self.values is None and self.feedback != "seeded":
            drawn = torch.cat([part for _, _, part in self._slices(error, shape, torch.device("cpu"))])
            self.values = drawn.to(error.device, torch.promote_types(error.dtype, torch.float32))

    def _kept(self, error: Tensor, shape: Shape) -> Tensor:
        """The matrix that is kept, drawn at its first use."""
        self.prepare(error, shape)
        assert self.values is not None
        self._check_sizes(error, shape)
        if self.values.device != error.device:
            self.values = self.values.to(error.device)
        return self.values.to(error.dtype)

    def _check_sizes(self, error: Tensor, shape: Shape) -> None:
        """Refuse other sizes than the first ones: B is one matrix, also where it is drawn anew at each use.

        Raises:
            InputError: the sizes are others.
        """
        sizes = self._sizes(error, shape)
        first = self.sizes if self.values is None else tuple(self.values.shape)
        if first is None:
            if not torch.compiler.is_compiling():  # it traces no backward pass that changes a module
                self.sizes = sizes
        elif sizes != first:
            kind = "channels" if self.feedback == "channel" else "units"
            # A source of one position is the model's output as a whole: one value a channel of it would have as many columns.
            helps = self.feedback != "channel" and (sizes[1] == first[1] or error.shape[2] > 1)
            hint = ", or use feedback='channel', which sums over positions" if helps else ""
            raise InputError(
                f"the feedback matrix was drawn for {first[1]} {kind} of the source and {first[0]} of the target, not for "
                f"{sizes[1]} and {sizes[0]}: sizes must stay{hint}"
            )

    def _sizes(self, error: Tensor, shape: Shape) -> tuple[int, int]:
        """Rows and columns of what is drawn."""
        if self.feedback == "channel":
            return shape[1], error.shape[1]
        return shape[1] * shape[2], error.shape[1] * error.shape[2]

    def _slices(self, error: Tensor, shape: Shape, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """First row, row after the last, and values of each slice."""
        rows, columns = self._sizes(error, shape)
        spread = deviation(init=self.init, gain=self.gain, fan_in=shape[1] * shape[2], fan_out=error.shape[1] * error.shape[2])
        height = max(1, SLICE // columns)
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            seed = (self.seed + start) % 2**63
            yield start, stop, random_matrix((stop - start, columns), device, self.distribution, spread, seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.values is not None:
            self.values = fn(self.values)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.values is not None:
            destination[f"{prefix}values"] = self.values

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        # The one in the checkpoint may have been drawn when this one is not yet, and the other way round.
        _, unexpected, errors = lists
        found = state_dict.get(f"{prefix}values")
        if strict:
            unexpected += [key for key in state_dict if key.startswith(prefix) and key != f"{prefix}values"]
        if found is None:
            return
        if self.values is None or self.values.is_meta or local_metadata.get("assign_to_params_buffers"):
            self.values = found.detach().clone()
        elif found.shape == self.values.shape:
            self.values.copy_(found)
        else:
            sizes = f"{tuple(found.shape)} in the checkpoint, {tuple(self.values.shape)} here"
            errors.append(f"size mismatch for {prefix}values: {sizes}")


@dataclass(frozen=True)
class Units:
    """How the units of a tensor lie, and the way to [N, C, P]: samples, channels, positions.

    Arguments:
        shape: the tensor's; an unbatched one has a leading 1.
        layout: where its channels are.
        samples: N.
        turned: whether positions lie outside of channels in memory, inside of them in the shape, as in `torch.channels_last`.

    Raises:
        InputError: the tensor's values can not be divided among the samples.
    """

    shape: torch.Size
    layout: Layout
    samples: int
    turned: bool = False

    def __post_init__(self) -> None:
        first = self.shape.numel() if self.layout == "sequence first" else self.shape[0]
        if first % self.samples:
            raise InputError(f"a tensor of shape {tuple(self.shape)} can not be divided among a batch of {self.samples}")

    @property
    def folded(self) -> Shape:
        """The shape [N, C, P]; a `torch.Size` made of sizes that a compiler keeps open it could not take to the backward pass."""
        channels = self.shape[1] if self.layout == "channels first" else self.shape[-1]
        return self.samples, channels, math.prod(self.shape) // (self.samples * channels)

    def fold(self, tensor: Tensor) -> Tensor:
        """A tensor of these units as [N, C, P]."""
        channels = self.folded[1]
        if self.layout == "channels first":
            split = tensor.reshape(self.samples, -1, channels, self.shape[2:].numel())
            return split.transpose(1, 2).reshape(self.folded)
        if self.layout == "sequence first":
            return tensor.reshape(-1, self.samples, channels).permute(1, 2, 0)
        return tensor.reshape(self.samples, -1, channels).transpose(1, 2)

    def unfold(self, signal: Tensor) -> Tensor:
        """The inverse of `fold`."""
        channels = self.folded[1]
        if self.layout == "channels first":
            split = signal.reshape(self.samples, channels, -1, self.shape[2:].numel())
            return split.transpose(1, 2).reshape(self.shape)
        if self.layout == "sequence first":
            return signal.permute(2, 0, 1).reshape(self.shape)
        return signal.transpose(1, 2).reshape(self.shape)
