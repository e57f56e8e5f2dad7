"""Direct rules: the error comes straight from the model's output, from the targets, or from all later layers."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fahooks.plugins import InputError
from fahooks.rules.base import Call, check_choice, register_rule
from fahooks.rules.direct_matrix import FEEDBACK, DirectMatrix, Units
from fahooks.rules.drawing import check_draw, draw
from fahooks.rules.passes import IGNORED, Pass, Targets, Visit, WholeModelRule, chosen, copy_without_edge, inject, mark, units


class RandomDirectRule(WholeModelRule):
    """What the rules of this file share: random matrices that they make once sizes are known.

    Arguments:
        feedback: "dense", "channel" or "seeded", see `DirectMatrix`.
        init: variance of the matrices, see `DirectMatrix`.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.
    """

    def __init__(self, *, feedback: str, init: str, distribution: str, gain: float) -> None:
        super().__init__()
        check_choice("feedback", feedback, FEEDBACK)
        check_draw(init, distribution, gain)
        self.options: dict[str, Any] = {"feedback": feedback, "init": init, "distribution": distribution, "gain": gain}
        self.grows = feedback != "seeded"

    @property
    def memory_bytes(self) -> int:
        """What its state takes now, the matrices that were drawn with it."""
        drawn = (module.values for module in self.modules() if isinstance(module, DirectMatrix))
        return super().memory_bytes + sum(values.nbytes for values in drawn if values is not None)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FromOutput(RandomDirectRule):
    """What `dfa` and `drtp` share: B [units of x, outputs], and a layer whose own input gradient is never computed."""

    def __init__(self, *, output: int | str | None, at: str | list[str] | None, **options: Any) -> None:
        super().__init__(**options)
        if at and options["feedback"] == "channel":
            raise InputError("feedback='channel' is for layers, and at= sends to blocks: use feedback='dense' or 'seeded'")
        self.output = output
        self.at = at

    @property
    def note(self) -> str:
        """What a residual path does, and when B takes memory."""
        path = (
            "a block gets the error that is sent to its output and no other, also where a residual path passes it by"
            if self.at
            else "where the network has residual paths, a residual path around a layer carries the errors sent to later layers "
            "down to its input, beside its own"
        )
        return f"{path}; B is drawn, and takes memory, in the first backward pass" if self.grows else path

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Note what B is drawn from, once sizes are known."""
        self.matrix = DirectMatrix(generator.initial_seed(), **self.options)

    def around(self, call: Call, input: Tensor) -> Tensor:
        """Apply the call to x without asking for a gradient of x."""
        self.visit(input, call.layout, unbatched=call.unbatched)
        return mark(call.plain(input.detach()))

    def cut(self, output: Any) -> Tensor:
        """The output of a block, for what follows: a copy that lets no error pass.

        Raises:
            InputError: the block returns something else than one tensor.
        """
        if not isinstance(output, Tensor):
            raise InputError(
                f"{self.label}: {self.name!r} returns a {type(output).__name__}; at= needs modules that return one tensor"
            )
        if not output.requires_grad:
            return output
        copy = copy_without_edge(output)
        self.visit(output, "channels last", copy=copy)
        return copy

    def finish(self, visit: Visit, output: Any, current: Pass) -> Any:
        """The output, with an edge to x."""
        tensor, replaced = chosen(output, self.output, self.label)
        if tensor is visit.copy:  # the block is the model's last: it gets the true gradient
            return replaced(visit.target())
        if torch.compiler.is_compiling():  # it traces no backward pass that changes a module
            samples = visit.units.samples
            self.matrix.prepare(tensor.detach().reshape(samples, -1, 1), visit.units.folded)
        return replaced(inject(tensor, visit.target(), partial(self.send, visit.units, current.targets), self, only_way=True))

    def send(self, units: Units, targets: Targets | None, error: Tensor) -> Tensor:
        """What x gets, of the error [N, ...] at the model's output."""
        if units.samples > 1 and (error.dim() == 0 or error.shape[0] != units.samples):
            raise InputError(
                f"{self.label}: the model's output has shape {tuple(error.shape)}, for a batch of {units.samples}: its first "
                "dimension must be that of the batch"
            )
        signal = self.signal(error.reshape(units.samples, -1), targets)
        # A signal that had to be turned round would take longer than the product that makes it.
        last = units.layout != "channels first"
        return units.unfold(self.matrix(signal.unsqueeze(2), units.folded, channels_last=last, turned=units.turned))

    def signal(self, error: Tensor, targets: Targets | None) -> Tensor:
        """What is multiplied by B: [N, outputs], of the error e of that shape."""
        return error


@register_rule("dfa", paper="Nøkland 2016, https://arxiv.org/abs/1609.01596")
class DirectFeedbackAlignment(FromOutput):
    """B e: the true gradient at the model's output, sent to every layer by a fixed random matrix of its own.

    The gradient is that of any loss, scaled and accumulated as it may be. A residual path around a layer carries the errors that
    later layers inject, and the true gradient of what follows them, down beside B e.

    Arguments:
        feedback: "dense" is B [units of x, outputs], for convolutions with spatial detail; "channel" has one value a channel;
            "seeded" draws the dense B anew at each use and keeps nothing.
        output: which tensor of the model's output, by index, key or attribute; needed where it has several.
        at: names of modules, or globs, to inject the error at the outputs of, with backpropagation inside them: the blocks of a
            residual network. Nothing else passes there, by no path. None injects at the input of every layer.
        init: variance of B: "fan_out" is 1/outputs, "fan_in" 1/units, "glorot" between.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.

    Raises:
        InputError: an option has no such value.
    """

    def __init__(
        self,
        *,
        feedback: str = "dense",
        output: int | str | None = None,
        at: str | list[str] | None = None,
        init: str = "fan_out",
        distribution: str = "normal",
        gain: float = 1.0,
    ) -> None:
        super().__init__(output=output, at=at, feedback=feedback, init=init, distribution=distribution, gain=gain)


@register_rule("drtp", paper="Frenkel et al. 2021, https://arxiv.org/abs/1909.01311")
class DirectRandomTargetProjection(FromOutput):
    """B y / N: the targets themselves, one-hot, sent to every layer by a fixed random matrix of its own.

    The forward pass must run inside `fahooks.targets(model, labels)`. As in a loss that is a mean, each sample counts 1/N.
    Targets do not shrink as errors do: activations should be bounded, as the tanh of Frenkel et al., or `gain` small beside the
    true gradient that the last layer learns from.

    Arguments:
        feedback: as of `dfa`.
        output: which tensor of the model's output the targets are for, by index, key or attribute; needed where it has several.
        at: as of `dfa`.
        init: variance of B: "fan_out" is 1/outputs, "fan_in" 1/units, "glorot" between.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.

    Raises:
        InputError: an option has no such value.
    """

    def __init__(
        self,
        *,
        feedback: str = "dense",
        output: int | str | None = None,
        at: str | list[str] | None = None,
        init: str = "fan_out",
        distribution: str = "normal",
        gain: float = 1.0,
    ) -> None:
        super().__init__(output=output, at=at, feedback=feedback, init=init, distribution=distribution, gain=gain)

    def signal(self, error: Tensor, targets: Targets | None) -> Tensor:
        """The targets as [N, outputs], over N.

        Raises:
            InputError: no targets were given, or they do not fit the output.
        """
        if targets is None:
            raise InputError("drtp needs the targets: run the forward pass inside `with fahooks.targets(model, labels):`")
        samples, outputs = error.shape
        labels = targets.labels
        if not labels.is_floating_point() and labels.numel() == samples and outputs > 1:
            labels = labels.flatten().long()
            # A compiler can not branch on values; the loss refuses such labels as well.
            unknown = (labels >= outputs) | (labels < 0) & (labels != IGNORED)
            if not torch.compiler.is_compiling() and unknown.any():
                raise InputError(f"drtp: class indices must be from 0 to {outputs - 1}, got {labels.min()} to {labels.max()}")
            labels = labels.unsqueeze(1) == torch.arange(outputs, device=labels.device)
        if labels.numel() != error.numel():
            raise InputError(
                f"drtp: targets of shape {tuple(labels.shape)} do not fit {samples} samples with {outputs} outputs: give class "
                "indices [N], or values of the shape of the output"
            )
        return labels.reshape(samples, outputs).to(error) * (targets.scale / samples)


@register_rule("dense_fa", paper="Moskovitz et al. 2018, https://arxiv.org/abs/1812.06488, section 4")
class DenseFeedbackAlignment(RandomDirectRule):
    """B^T delta + the sum of R_k delta_k over all later layers k: feedback alignment with residual feedback connections.

    Later are the layers with this rule that the forward pass calls later, save those that read the same x. Before torch.compile
    one step, forward and backward, has to be taken, in which the R_k are drawn.

    Arguments:
        feedback: storage of the R_k [units of x, units of layer k]: "dense", "channel" or "seeded", as of `dfa`.
        sign_concordant: B = abs(B_0) sign(W) as of `usf_init`, in place of B = B_0 as of `fa`.
        init: variance of B, as of `fa`, and of R_k: "fan_out" is 1/units of layer k, "fan_in" 1/units of x, "glorot" between.
        distribution: "normal" or "uniform", mean 0.
        gain: factor on the standard deviation.

    Raises:
        InputError: an option has no such value.
    """

    matrix: Tensor

    def __init__(
        self,
        *,
        feedback: str = "dense",
        sign_concordant: bool = False,
        init: str = "fan_out",
        distribution: str = "normal",
        gain: float = 1.0,
    ) -> None:
        super().__init__(feedback=feedback, init=init, distribution=distribution, gain=gain)
        self.sign_concordant = sign_concordant
        self.residual = nn.ModuleDict()

    @property
    def note(self) -> str:
        """When the R_k take memory."""
        return "the R_k are drawn, and take memory, in the first backward pass" if self.grows else ""

    def initialise(self, weight: Tensor, *, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
        """Draw B, and note what the R_k are drawn from."""
        self.seed = generator.initial_seed()
        options = {name: value for name, value in self.options.items() if name != "feedback"}
        self.register_buffer("matrix", draw(weight, fan_in=fan_in, fan_out=fan_out, generator=generator, **options))

    def forward(self, weight: Tensor) -> Tensor:
        """B."""
        matrix = self.matrix.to(weight.dtype)
        return weight.sign().mul_(matrix.abs()) if self.sign_concordant else matrix

    def around(self, call: Call, input: Tensor) -> Tensor:
        """Apply the call to x, with edges from its output to the inputs of all earlier layers."""
        visit = self.visit(input, call.layout, unbatched=call.unbatched)
        output = call.routed(input)
        if visit is None or self.passes.current is None:
            return output
        source = units(output, call.layout, visit.units.samples, unbatched=call.unbatched)
        for earlier in self.passes.current.visits[:-1]:
            same = earlier.tensor is input and earlier.version == visit.version
            if isinstance(earlier.rule, DenseFeedbackAlignment) and not same:
                send = partial(earlier.rule.send, self.name, source, earlier.units)
                output = inject(output, earlier.target(), send, earlier.rule)
        return output

    def send(self, later: str, source: Units, target: Units, error: Tensor) -> Tensor:
        """R_k delta_k for x, of the error delta_k at the output of layer `later`."""
        matrix = self.residual_from(later)
        return target.unfold(matrix(source.fold(error), target.folded, turned=target.turned))

    def residual_from(self, later: str) -> DirectMatrix:
        """The matrix R_k from the layer called `later`."""
        key = later.replace(".", "/")
        if key not in self.residual:
            if torch.compiler.is_compiling():
                raise InputError(
                    f"{self.label}: take one step, forward and backward, before torch.compile: the R_k are drawn in it"
                )
            digest = hashlib.sha256(f"{self.seed}/{later}".encode()).digest()
            self.residual[key] = DirectMatrix(int.from_bytes(digest[:8], "little") >> 1, **self.options)
        matrix: Any = self.residual[key]
        return matrix

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        start = f"{prefix}residual."
        for key in [key for key in state_dict if key.startswith(start)]:
            self.residual_from(key.removeprefix(start).rpartition(".")[0].replace("/", "."))
        super()._load_from_state_dict(state_dict, prefix, *rest)
