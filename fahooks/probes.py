"""Probes: how the learning signals that the rules send compare with the true gradient, layer by layer.

The learning signal of a layer u = Wx + b is delta = dJ/du, what its weights learn from. With rules on it is an approximation
of the true gradient; the angle between the two is what Figure 3 of Moskovitz et al. 2018 shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fahooks.observation import as_found
from fahooks.plugins import InputError
from fahooks.rules.base import check_model
from fahooks.rules.sharding import is_sharded, reshard, whole
from fahooks.surgery import CONVERTIBLE, backprop, feedback_layers

Total = Callable[[Tensor], Tensor]


class Probe:
    """What `probe` yields. Each mapping goes from a layer's qualified name, in model order, to its last measurement.

    Arguments:
        model: see `probe`.
        total: see `probe`.

    Attributes:
        angle: degrees between the layer's learning signal and the true gradient at its output, both flattened over the whole
            batch: 0 is the true gradient, 90 is orthogonal. NaN where either is zero.
        norm_ratio: L2 norm of the learning signal over that of the true gradient.
        weight_angle: degrees between the gradients that the layer's weight gets.
        sign_flips: fraction of the layer's weights whose sign differs from what it was when the probe started.
    """

    def __init__(self, model: nn.Module, *, total: Total | None = None) -> None:
        check_model(model)
        layers = dict(model.named_modules())
        converted = feedback_layers(model)
        self.model = model
        self.total = total
        self.layers = {name: m for name, m in layers.items() if isinstance(m, CONVERTIBLE) or name in converted}
        if not self.layers:
            raise InputError("nothing to probe: the model has no linear or convolution layer")
        self.signs = self._signs()
        self.angle: dict[str, float] = {}
        self.norm_ratio: dict[str, float] = {}
        self.weight_angle: dict[str, float] = {}
        self.sign_flips: dict[str, float] = {}

    def measure(self, loss: Callable[[], Tensor]) -> None:
        """Run `loss` twice, with rules on and off, at the same random numbers, and compare what reaches each layer.

        Parameters' `.grad`, the random number generators, and buffers such as running statistics are left as they were.

        Arguments:
            loss: runs the model on one batch and returns the scalar loss.

        Raises:
            InputError: the loss is no scalar that depends on the model.
        """
        signals, gradients = self._signals(loss)
        with backprop(self.model):
            true_signals, true_gradients = self._signals(loss)
        called = [name for name in self.layers if name in signals and name in true_signals]
        self.angle = {name: degrees(signals[name], true_signals[name], self.total) for name in called}
        self.norm_ratio = {name: _ratio(signals[name], true_signals[name], self.total) for name in called}
        self.weight_angle = {name: degrees(gradients[name], true_gradients[name]) for name in gradients if name in true_gradients}
        flips = {name: whole((sign != self.signs[name]).sum()).item() for name, sign in self._signs().items()}
        self.sign_flips = {name: count / self.signs[name].numel() for name, count in flips.items()}

    @torch.no_grad()
    def _signs(self) -> dict[str, Tensor]:
        """Sign of every layer's effective weight; a parametrization that computes it may draw numbers or count calls."""
        reshard(self.model)
        with as_found(self.model):
            weights = {name: getattr(layer, "weight", None) for name, layer in self.layers.items()}
            return {name: weight.sign() for name, weight in weights.items() if isinstance(weight, Tensor)}

    def _signals(self, loss: Callable[[], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradient at every layer's output, and of every layer's weight, each flattened to one vector."""
        received: dict[str, list[Tensor]] = {}
        reshard(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with as_found(self.model), _listening(self.layers, received), torch.enable_grad():
            value = loss()
            if value.numel() != 1 or not value.requires_grad:
                raise InputError(
                    f"a probe needs a scalar loss that depends on the model's weights, got shape {tuple(value.shape)}, "
                    f"requires_grad={value.requires_grad}"
                )
            by_parameter = self._gradients(value, parameters)
        found = {id(p): g for p, g in zip(parameters, by_parameter, strict=True) if g is not None}
        own = {name: id(layer._parameters.get("weight")) for name, layer in self.layers.items()}
        weights = {name: found[key].flatten() for name, key in own.items() if key in found}
        return {name: torch.cat(parts) for name, parts in received.items()}, weights

    def _gradients(self, value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The whole gradient of each parameter, of the batches of all processes."""
        if not any(is_sharded(p) for p in parameters):
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            return [g if g is None or self.total is None else self.total(g) for g in found]
        # Sharded ones are no part of the graph: only a whole backward pass gives them gradients, those of all processes.
        before = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            value.backward()
            return [None if p.grad is None else whole(p.grad) for p in parameters]
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient


@contextmanager
def probe(model: nn.Module, *, total: Total | None = None) -> Iterator[Probe]:
    """Measure the learning signals of `model`, converted or not.

        with fahooks.probe(model) as p:
            for x, y in batches:
                ...                                                  # your training step
                p.measure(lambda: cross_entropy(model(x), y))
                print(p.angle["conv1"], p.norm_ratio["conv1"], p.sign_flips["conv1"])

    Costs two forward and backward passes a measurement and nothing between measurements.

    Arguments:
        model: a plain one, one that DistributedDataParallel wraps (give the one inside), or a sharded one (`fully_shard`), which
            all processes have to measure at the same time; parameters of the loss outside of that one then gather gradients.
        total: gives the sum of a tensor over processes, each of which then measures its share of one batch at the same time;
            without it each process measures its own batch.

    Raises:
        InputError: the model has no layer to probe.
    """
    yield Probe(model, total=total)


def degrees(a: Tensor, b: Tensor, total: Total | None = None) -> float:
    """The angle between two tensors seen as vectors, in degrees, 0 to 180; NaN where either is zero.

    Accurate near 0 too, where the arc cosine is not (Kahan's formula); equal tensors give exactly 0. Where `total` adds up over
    processes, the vectors are those of all processes, one after the other.
    """
    a, b = a.double().flatten(), b.double().flatten()
    norms = _norms(total, a, b)
    if not (norms[0] > 0 and norms[1] > 0):
        return math.nan
    a, b = a / norms[0], b / norms[1]
    return math.degrees(2 * math.atan2(*_norms(total, a - b, a + b).tolist()))


def _ratio(a: Tensor, b: Tensor, total: Total | None) -> float:
    norm, divisor = _norms(total, a.double(), b.double()).tolist()
    return norm / divisor if divisor else math.nan


def _norms(total: Total | None, *vectors: Tensor) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(vector) for vector in vectors])
    return norms if total is None else total(norms.square()).sqrt()


@contextmanager
def _listening(layers: dict[str, nn.Module], received: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect the gradient at the output of each layer, of all its calls.

    A hook on the output tensor, not on the module: it sees the gradient at u even where an activation then overwrites u.
    """

    def listener(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: received.setdefault(name, []).append(grad.detach().flatten()))

        return listen

    handles = [layer.register_forward_hook(listener(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
