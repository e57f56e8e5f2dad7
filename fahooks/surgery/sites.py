"""Where: the weights of a model that a rule can serve, and why it can not serve the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fahooks import plugins
from fahooks.plugins import InputError
from fahooks.rules.base import Rule
from fahooks.surgery.layer import FeedbackLayer, swap, without_feedback


class ConversionError(InputError):
    """The model or the arguments can not be converted as asked."""


CONVERTIBLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


UNCONVERTIBLE: dict[type[nn.Module], str] = {
    nn.Embedding: "a look-up sends no error to its integer input",
    nn.EmbeddingBag: "a look-up sends no error to its integer input",
    nn.RNNBase: "the weights are used inside one fused recurrent operation",
    nn.RNNCellBase: "the weights are used inside one fused recurrent operation",
}


NO_ADAPTER = "no adapter names it; fahooks.audit tells whether it sends an error back"


@dataclass(frozen=True)
class Site:
    """One weight that a rule can serve.

    Attributes:
        name: its name in reports.
        around: the modules around it, the one that owns it last.
        attribute: the weight's name there; empty where there is none, and for a block, whose output is the site.
        obstacle: why no rule can serve it; None if one can.
        transposed: whether the weight is that of a linear map, kept as [in, out].
    """

    name: str
    around: tuple[nn.Module, ...]
    attribute: str
    obstacle: str | None = None
    transposed: bool = False

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight."""
        return self.around[-1]

    @property
    def named(self) -> bool:
        """Whether an adapter names the weight, rather than the module being a layer with one weight."""
        return self.attribute != "weight" or not isinstance(self.module, CONVERTIBLE)

    @property
    def is_block(self) -> bool:
        """Whether the site is the output of the module, rather than a weight."""
        return not self.attribute and self.obstacle is None

    @property
    def plain_type(self) -> type[nn.Module]:
        """The class of that module as it is without fahooks."""
        return without_feedback(type(self.module))

    def weight(self) -> Tensor:
        """The effective weight, without side effects of the parametrizations that compute it."""
        with torch.no_grad(), ExitStack() as stack:
            for child in _parametrization(self.module, self.attribute).modules():
                stack.callback(setattr, child, "training", child.training)
                child.training = False
            return getattr(self.module, self.attribute)

    def rule(self) -> Rule | None:
        """The rule that the weight has now."""
        if not isinstance(self.module, FeedbackLayer) or self.module.at_output != self.is_block:
            return None
        rules: Any = self.module._modules.get("feedback")
        found: Any = rules._modules.get(self.attribute) if isinstance(rules, nn.ModuleDict) else rules
        return found if self.attribute or self.is_block else None

    def attach(self, rule: Rule) -> None:
        """Make the module a feedback layer with `rule`: as `feedback`, or as an entry of it where an adapter names the weight."""
        layer = swap(self.module)
        layer.at_output = self.is_block
        if self.is_block or not self.named:
            layer.feedback = rule
        else:
            rules: Any = layer._modules.setdefault("feedback", nn.ModuleDict())
            rules[self.attribute] = rule


def find_sites(model: nn.Module) -> Iterator[Site]:
    """The weights of `model` that a rule could serve, and the layers with weights that none can, in model order.

    Raises:
        ConversionError: a part of the model is scripted.
    """
    modules = modules_of(model)
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(f"{name or 'the model'} is a torch.jit.ScriptModule: convert before torch.jit.script or trace")
        around = (model, *(modules[n] for n in reversed(lineage(name))))
        if isinstance(module, CONVERTIBLE):
            yield _make_site(name, around, "weight")
        for weight in _adapted(module) or ():
            attribute = weight.removesuffix(TRANSPOSED)
            if "." not in attribute:
                site = _make_site(join(name, attribute), around, attribute)
                yield replace(site, transposed=weight.endswith(TRANSPOSED))
        reason = next((text for cls, text in UNCONVERTIBLE.items() if isinstance(module, cls)), None)
        if reason:
            yield Site(name, around, "", reason)
        elif not isinstance(module, CONVERTIBLE) and "parametrizations" not in name.split("."):
            yield from _unnamed(name, around)


def find_blocks(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """The modules that `patterns` name, in model order; of one inside another, the outer one.

    Arguments:
        model: any module.
        patterns: qualified names, or globs over them.

    Raises:
        ConversionError: a pattern names none.
    """
    modules = modules_of(model)
    names = [name for name in modules if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConversionError(f"at: {pattern!r} matches none of the {len(names)} modules{plugins.near(pattern, names)}")
    named = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    outer = [name for name in names if name in named and not named.intersection(lineage(name)[1:])]
    return [Site(name, (model, *(modules[n] for n in reversed(lineage(name)))), "") for name in outer]


def _unnamed(name: str, around: tuple[nn.Module, ...]) -> Iterator[Site]:
    """The parameters of a module that are shaped like weights, and that no adapter names; tables of biases are only added."""
    module = around[-1]
    named = functional_weights(module) or ()
    for attribute, parameter in module.named_parameters(recurse=False):
        if attribute in named or "bias" in attribute or is_lazy(parameter):
            continue
        if parameter.dim() > 1 and min(parameter.shape[:2]) > 1:
            yield Site(join(name, attribute), around, attribute, NO_ADAPTER)


def _make_site(name: str, around: tuple[nn.Module, ...], attribute: str) -> Site:
    module = around[-1]
    weights = list(_parametrization(module, attribute).parameters()) or [getattr(module, attribute, None)]
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(tensors) < len(weights):
        return Site(name, around, "", "it has no weight")
    return Site(name, around, attribute, _obstacle(module, tensors))


def _parametrization(module: nn.Module, attribute: str) -> nn.Module:
    """What computes a parametrized weight; an empty module where the weight is a plain parameter."""
    lists: Any = module.parametrizations if parametrize.is_parametrized(module, attribute) else {}
    return lists[attribute] if attribute in lists else nn.Module()


def _obstacle(module: nn.Module, weights: Sequence[Tensor]) -> str | None:
    if any(weight.is_complex() for weight in weights):
        return "complex weights are not supported"
    if any(not weight.is_floating_point() for weight in weights):
        return "integer weights are not supported"
    if any(weight.layout is not torch.strided for weight in weights):
        return "sparse weights are not supported"
    if any(not is_lazy(weight) and weight.numel() == 0 for weight in weights):
        return "its weight is empty"
    if isinstance(module, FeedbackLayer):
        return None
    if "forward" in vars(module):
        return "the object has a forward of its own, set over that of its class"
    return "it has an attribute named 'feedback' of its own" if hasattr(module, "feedback") else None


def check_materialised(site: Site) -> None:
    """Refuse a weight that has no values yet.

    Raises:
        ConversionError: its layer is lazy or on the meta device; the message says what to do.
    """
    for parameter in site.module.parameters():
        if is_lazy(parameter):
            raise ConversionError(f"layer {site.name!r} has no shape yet: run one batch through the model, then convert")
        if parameter.is_meta:
            raise ConversionError(f"layer {site.name!r} is on the meta device: materialise and fill the model, then convert")


TRANSPOSED = ".mT"


def functional_weights(module: nn.Module) -> tuple[str, ...] | None:
    """The weights that `module`'s forward uses functionally, by its adapter; None where it has none."""
    names = _adapted(module)
    return None if names is None else tuple(name.removesuffix(TRANSPOSED) for name in names)


def _adapted(module: nn.Module) -> tuple[str, ...] | None:
    """What the adapter of `module` says; None where it has none."""
    for cls in _plain_mro(module):
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in plugins.adapters:
            return tuple(plugins.adapters.get(name).target(module))
    return None


def _plain_mro(module: nn.Module) -> Sequence[type]:
    """The classes of `module` as they are without fahooks."""
    return [cls for cls in type(module).__mro__ if "plain_class" not in cls.__dict__ and cls is not FeedbackLayer]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules` without the insides of rules: each module once, by its first name."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        for child_name, child in module._modules.items():
            if child is not None and not (isinstance(module, FeedbackLayer) and child_name == "feedback"):
                visit(child, join(name, child_name))

    visit(model, "")
    return found


def join(prefix: str, name: str) -> str:
    """The qualified name of `name` within `prefix`."""
    return f"{prefix}.{name}" if prefix else name


def lineage(name: str) -> list[str]:
    """A qualified name and those of the modules around it: "a.b.c" gives "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
