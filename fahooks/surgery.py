"""Surgery: turn the layers of a model into feedback layers, in place, and back.

A converted layer is the same object with the same parameters; only its class is swapped for `Feedback<Class>`, and its
feedback rule sits beside its weight as `layer.feedback`. Its forward is the class's own, with the convolution and linear
calls inside it routed to `fahooks.functional`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fahooks import functional, plugins
from fahooks.plugins import InputError, near
from fahooks.rules.base import FunctionRule, Rule

Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]"
RuleLike: TypeAlias = "str | type[Rule] | Callable[[Tensor], Tensor] | Mapping[str, Any]"


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
    nn.Bilinear: "two inputs share one weight; no feedback matrix is defined",
    nn.RNNBase: "the weights are used inside one fused recurrent operation",
    nn.RNNCellBase: "the weights are used inside one fused recurrent operation",
}


# ---------------------------------------------------------------- feedback layers


class FeedbackLayer(nn.Module):
    """The mixin of every converted layer, leftmost among its bases.

    Attributes:
        feedback: the layer's rule; for a module with several weights of its own (attention), an `nn.ModuleDict` of rules by
            parameter name.
        feedback_enabled: False inside `fahooks.backprop`.
        functional_weights: for a module that uses weights functionally, their names (of its own or of children); else None.
    """

    feedback: nn.Module
    feedback_enabled: bool
    functional_weights: tuple[str, ...] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, its weights' calls routed through the feedback rule where gradients are recorded."""
        if not (self.feedback_enabled and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        with _Routing(self):
            return super().forward(*args, **kwargs)

    def feedback_for(self, weight: Tensor) -> functional.Feedback | None:
        """What maps the weight of one call to its feedback matrix; None where the call is not this layer's to route."""
        if self.functional_weights is None:
            rule = self.feedback
            return rule if weight.shape == rule.weight_shape else None
        for name in self.functional_weights:
            owner, parameter, rule = _functional_weight(self, name)
            if rule is None:
                continue
            if weight is parameter:
                return rule
            if weight._base is parameter:
                return _feedback_of_view(rule, parameter, weight)
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the plain class: the class with feedback is made anew, and can not be imported by name."""
        return _restore, (plain_class(type(self)),), self.__getstate__()


class _Routing(TorchFunctionMode):
    """While active, sends the calls that use the layer's weights to the core."""

    def __init__(self, layer: FeedbackLayer) -> None:
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        core = functional.ROUTES.get(func)
        if core is not None:
            feedback = self.layer.feedback_for(args[1] if len(args) > 1 else kwargs["weight"])
            if feedback is not None:
                return core(*args, **kwargs, feedback=feedback)
        elif func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention_forward(*args, **kwargs)
        return func(*args, **kwargs)


# A mode sees this Python function as one opaque call. Without its own check for overrides, its inner calls are seen.
_multi_head_attention_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _functional_weight(layer: nn.Module, name: str) -> tuple[nn.Module, Tensor, nn.Module | None]:
    """Owner, tensor and rule (None where not converted) of the weight called `name` relative to `layer`."""
    path, _, attribute = name.rpartition(".")
    owner = layer.get_submodule(path)
    rule = owner._modules.get("feedback")
    if owner is layer and isinstance(rule, nn.ModuleDict):
        rule = rule[attribute] if attribute in rule else None
    return owner, getattr(owner, attribute), rule


def _feedback_of_view(rule: nn.Module, parameter: Tensor, view: Tensor) -> functional.Feedback:
    """The same view of B as `view` is of W: one chunk of a packed projection."""
    geometry = view.size(), view.stride(), view.storage_offset() - parameter.storage_offset()

    def feedback(weight: Tensor) -> Tensor:
        return rule(parameter.detach()).contiguous().as_strided(*geometry).to(weight.dtype)

    return feedback


_feedback_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def feedback_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`Feedback<Class>` for a layer class; one for each class, so that compiled guards on the type hold."""
    made = _feedback_classes.get(cls)
    if made is None:
        namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "plain_class": cls}
        made = types.new_class(f"Feedback{cls.__name__}", (FeedbackLayer, cls), exec_body=lambda ns: ns.update(namespace))
        _feedback_classes[cls] = made
    return made


def _with_feedback(module: nn.Module) -> type[nn.Module]:
    """The class for a module once converted; below the class that a parametrization derived, which stays outermost."""
    cls = type(module)
    if parametrize.is_parametrized(module) and len(cls.__bases__) == 1:
        return _derive(cls, (feedback_class(cls.__bases__[0]),), cls.__name__)
    return feedback_class(cls)


def _without_feedback(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with its feedback class replaced by the plain one, also below classes that torch derived from it later."""
    if "plain_class" in cls.__dict__:
        return cls.__dict__["plain_class"]
    if not issubclass(cls, FeedbackLayer):
        return cls
    bases = tuple(_without_feedback(base) for base in cls.__bases__)
    return _derive(cls, bases, cls.__name__.replace("Feedback", "", 1))


def _derive(cls: type[nn.Module], bases: tuple[type[nn.Module], ...], name: str) -> type[nn.Module]:
    """A copy of `cls` on other bases."""
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(name, bases, exec_body=lambda ns: ns.update(namespace))


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The layer class that a feedback class, or a class that others derived from one, was made for."""
    return next(c.__dict__["plain_class"] for c in cls.__mro__ if "plain_class" in c.__dict__)


def _restore(cls: type[nn.Module]) -> nn.Module:
    made = feedback_class(cls)
    return made.__new__(made)


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: qualified name; for one of several weights of a module, with the parameter's name.
        type: the plain class's name.
        weight_shape: shape of W.
        rule: the rule as printed, empty where not converted.
        memory_bytes: what the rule's state adds.
        reason: why it was not converted; None if it was.
    """

    name: str
    type: str
    weight_shape: tuple[int, ...]
    rule: str
    memory_bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What `convert` did, layer by layer; prints as a table."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def converted(self) -> list[str]:
        """Names of the converted layers, in model order."""
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """Why each other layer was not converted, by name."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    @property
    def memory_bytes(self) -> int:
        """Bytes that the rules' state adds to the model."""
        return sum(layer.memory_bytes for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The report in types that json can write."""
        return {"layers": [vars(layer) for layer in self.layers], "memory_bytes": self.memory_bytes}

    def __str__(self) -> str:
        header = ("layer", "type", "weight", "rule", "bytes added", "")
        rows = [header] + [
            (
                layer.name or "(model)",
                layer.type,
                "x".join(map(str, layer.weight_shape)),
                layer.rule,
                str(layer.memory_bytes),
                f"skipped: {layer.reason}" if layer.reason else "converted",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{len(self.converted)} of {len(self.layers)} layers converted, {self.memory_bytes:,} bytes added"
        return "\n".join([*lines, total])


# ---------------------------------------------------------------- convert, revert, backprop


def convert(
    model: nn.Module,
    rule: RuleLike = "fa",
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    seed: int = 0,
    **rule_options: Any,
) -> Report:
    """Make the layers of `model` send errors back through feedback matrices, in place.

    The arguments describe the whole result: converting again with the same ones changes nothing, with others the model
    ends as if it had been converted with those from the start.

    Arguments:
        model: any module. Linear, Conv1d-3d, ConvTranspose1d-3d, their subclasses, nn.MultiheadAttention and every module
            with an adapter are converted. Weights, keys, hooks and parameters' identity stay.
        rule: a registered name, a Rule class, a function W -> B, or an ordered mapping from selectors to any of these (or
            to {"rule": name, **options}); the first selector that matches decides, layers that none matches stay.
        include: convert only what this selects: a module type, a glob over qualified names ("layer1.*"; it also selects
            everything below a module of that name), a compiled regex, a function (name, module) -> bool, or a list of these.
        exclude: leave out what this selects.
        seed: every B is drawn from a private generator keyed by (seed, layer name), on the CPU. Layers that share one
            Parameter have different names, so each has its own B.
        rule_options: options of the rule, e.g. `gain=0.5`.

    Returns:
        What was done, layer by layer.

    Raises:
        UnknownName: no such rule.
        ConversionError: nothing to convert, a selector that selects nothing, lazy layers not yet materialised, weights on
            the meta device, or a scripted model.
        InputError: options that the rule does not take.
    """
    sites = list(_sites(model))
    choose = _rule_chooser(rule, rule_options, sites)
    selected = _selected(sites, include, exclude)
    _check_materialised(sites)
    plan: list[tuple[_Site, Rule | None, str | None]] = []
    for site in sites:
        reason = site.obstacle or selected[site.name]
        new = None
        if reason is None:
            choice = choose(site)
            new = choice.rule_for(site, seed) if choice else None
            reason = _reason_left(choice, new)
        plan.append((site, new, reason))
    if not any(new for _, new, _ in plan) and not any(reason == _LEFT_BY_BP for _, _, reason in plan):
        raise ConversionError(_nothing_converted(plan))
    _apply(model, plan)
    return Report([_describe(site, new, reason) for site, new, reason in plan])


def revert(model: nn.Module) -> None:
    """Undo `convert`: classes, state_dict keys and gradients are as before; a model that was not converted stays as it is."""
    for module in list(_modules(model).values()):
        if isinstance(module, FeedbackLayer):
            _revert_layer(module)


@contextmanager
def backprop(model: nn.Module) -> Iterator[None]:
    """Switch every rule of `model` off for the forward passes inside: their backward gives true gradients.

    Nests, and restores what was before also when the body raises.
    """
    layers = [module for module in _modules(model).values() if isinstance(module, FeedbackLayer)]
    before = [layer.feedback_enabled for layer in layers]
    for layer in layers:
        layer.feedback_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.feedback_enabled = enabled


def feedback_layers(model: nn.Module) -> dict[str, FeedbackLayer]:
    """The converted layers of `model` that hold a rule, by qualified name."""
    return {
        name: module
        for name, module in _modules(model).items()
        if isinstance(module, FeedbackLayer) and "feedback" in module._modules
    }


def feedback_rules(model: nn.Module) -> dict[str, Rule]:
    """Every rule of `model`, by the name that its weight has in the report."""
    rules: dict[str, Rule] = {}
    for name, layer in feedback_layers(model).items():
        if isinstance(layer.feedback, nn.ModuleDict):
            rules.update({_join(name, parameter): rule for parameter, rule in layer.feedback.items()})
        else:
            rules[name] = layer.feedback
    return rules


# ---------------------------------------------------------------- where: the sites of a model


@dataclass(frozen=True)
class _Site:
    """One weight that a rule can serve: its name in reports, the module that owns it, its attribute, why not."""

    name: str
    module: nn.Module
    attribute: str | None
    obstacle: str | None = None

    @property
    def own(self) -> bool:
        """Whether the weight is one of several that an adapter names, rather than the weight of a plain layer."""
        return self.attribute not in (None, "weight") or not isinstance(self.module, CONVERTIBLE)

    @property
    def type(self) -> type[nn.Module]:
        return _without_feedback(type(self.module))

    def weight(self) -> Tensor:
        """The effective weight, without side effects of the parametrizations that compute it."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return getattr(self.module, self.attribute)
        with torch.no_grad(), ExitStack() as stack:
            for child in self.module.parametrizations[self.attribute].modules():
                stack.callback(setattr, child, "training", child.training)
                child.training = False
            return getattr(self.module, self.attribute)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
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
                visit(child, _join(name, child_name))

    visit(model, "")
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _sites(model: nn.Module) -> Iterator[_Site]:
    for name, module in _modules(model).items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(f"{name or 'the model'} is a torch.jit.ScriptModule: convert before torch.jit.script or trace")
        if isinstance(module, CONVERTIBLE):
            yield _Site(name, module, "weight", _obstacle(module))
        for weight in functional_weights(module) or ():
            if "." not in weight:
                yield _Site(_join(name, weight), module, weight)
        reason = next((text for cls, text in UNCONVERTIBLE.items() if isinstance(module, cls)), None)
        if reason:
            yield _Site(name, module, None, reason)


def functional_weights(module: nn.Module) -> tuple[str, ...] | None:
    """The weights that `module`'s forward uses functionally, by its adapter; None where it has none."""
    for cls in plain_mro(module):
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in plugins.adapters:
            return tuple(plugins.adapters.get(name).target(module))
    return None


def plain_mro(module: nn.Module) -> Sequence[type]:
    """The classes of `module` as they are without fahooks."""
    return [cls for cls in type(module).__mro__ if "plain_class" not in cls.__dict__ and cls is not FeedbackLayer]


def _obstacle(module: nn.Module) -> str | None:
    parameters = list(module.parameters(recurse=False)) or [p for p in module.parameters()]
    if not parameters:
        return "it has no weight"
    if any(p.is_complex() for p in parameters):
        return "complex weights are not supported"
    if any(p.layout is not torch.strided for p in parameters):
        return "sparse weights are not supported"
    if not isinstance(module, FeedbackLayer) and hasattr(module, "feedback"):
        return "it has an attribute named 'feedback' of its own"
    return None


def _check_materialised(sites: Sequence[_Site]) -> None:
    for site in sites:
        for parameter in site.module.parameters(recurse=False):
            if isinstance(parameter, UninitializedTensorMixin):
                raise ConversionError(f"layer {site.name!r} has no shape yet: run one batch through the model, then convert")
            if parameter.is_meta:
                raise ConversionError(f"layer {site.name!r} is on the meta device: materialise and fill the model, then convert")


# ---------------------------------------------------------------- which: selectors


def _selected(sites: Sequence[_Site], include: Any, exclude: Any) -> dict[str, str | None]:
    """Why each site is not selected, by name; None where it is."""
    included = _any_selector(include, sites, "include") if include is not None else lambda site: True
    excluded = _any_selector(exclude, sites, "exclude") if exclude is not None else lambda site: False
    return {s.name: "excluded" if excluded(s) else None if included(s) else "not included" for s in sites}


def _any_selector(selectors: Any, sites: Sequence[_Site], role: str) -> Callable[[_Site], bool]:
    tests = [_selector(s, sites, role) for s in (selectors if isinstance(selectors, list | tuple) else [selectors])]
    return lambda site: any(test(site) for test in tests)


def _selector(selector: Any, sites: Sequence[_Site], role: str) -> Callable[[_Site], bool]:
    """A test for sites; one that no site passes is an error, so that a misspelt name is never silent."""
    test = _site_test(selector, role)
    if not any(test(site) for site in sites):
        names = [site.name for site in sites]
        shown = selector if isinstance(selector, str) else getattr(selector, "__name__", selector)
        hint = near(selector, names) if isinstance(selector, str) else ""
        raise ConversionError(f"{role}: {shown!r} matches none of the {len(sites)} layers{hint or _for_example(names)}")
    return test


def _site_test(selector: Any, role: str) -> Callable[[_Site], bool]:
    if isinstance(selector, str):
        return lambda site: any(fnmatch.fnmatchcase(name, selector) for name in _lineage(site.name))
    if isinstance(selector, re.Pattern):
        return lambda site: selector.search(site.name) is not None
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        return lambda site: isinstance(site.module, selector)
    if callable(selector):
        return lambda site: bool(selector(site.name, site.module))
    raise ConversionError(
        f"{role}: expected a name pattern, a compiled regex, a module type or a function (name, module) -> bool, got {selector!r}"
    )


def _lineage(name: str) -> list[str]:
    """A qualified name and those of the modules around it: "a.b.c" gives "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _for_example(names: Sequence[str]) -> str:
    return f"; layers are named like {', '.join(map(repr, names[:3]))}" if names else ""


# ---------------------------------------------------------------- what: rules


@dataclass(frozen=True)
class _Choice:
    """A rule as the user chose it, before it is made for a layer."""

    make: Callable[[], Rule]
    identity: tuple[Any, ...]
    label: str

    def rule_for(self, site: _Site, seed: int) -> Rule | None:
        """The rule for one site: the one it has if that came from the same choice, else a new one; None for backprop."""
        if self.label == "bp":
            return None
        origin = (*self.identity, seed, site.name)
        present = _present_rule(site)
        if present is not None and present.__dict__.get("origin") == origin:
            return present
        rule = self.make()
        weight = site.weight().detach()
        fan_in, fan_out = _fans(site, weight)
        generator = torch.Generator().manual_seed(_seed(seed, site.name))
        rule.initialise(weight, fan_in=fan_in, fan_out=fan_out, generator=generator)
        rule.weight_shape = weight.shape
        rule.label = self.label
        rule.origin = origin
        return rule.train(site.module.training)


_LEFT_BY_BP = "rule bp: left as it is"


def _reason_left(choice: _Choice | None, rule: Rule | None) -> str | None:
    if choice is None:
        return "no pattern matches"
    return None if rule is not None else _LEFT_BY_BP


def _rule_chooser(rule: Any, options: Mapping[str, Any], sites: Sequence[_Site]) -> Callable[[_Site], _Choice | None]:
    if not isinstance(rule, Mapping) or "rule" in rule:
        choice = _choice(rule, options)
        return lambda site: choice
    if options:
        raise ConversionError(
            f"options {', '.join(options)} belong beside a rule: {{pattern: {{'rule': name, option: value}}}}, got a mapping of rules"
        )
    if not rule:
        raise ConversionError("the mapping of rules is empty")
    table = [(_selector(selector, sites, "rule"), _choice(value, {})) for selector, value in rule.items()]
    return lambda site: next((choice for test, choice in table if test(site)), None)


def _choice(rule: Any, options: Mapping[str, Any]) -> _Choice:
    if isinstance(rule, Mapping):
        if "rule" not in rule:
            raise ConversionError(f"expected {{'rule': name, option: value, ...}}, got {dict(rule)!r}")
        return _choice(rule["rule"], {**{k: v for k, v in rule.items() if k != "rule"}, **options})
    if isinstance(rule, str):
        entry = plugins.rules.get(rule)
        entry.build(**options)
        return _Choice(lambda: entry.build(**options), (entry.target, _frozen(options)), rule)
    if isinstance(rule, type) and issubclass(rule, Rule):
        return _Choice(lambda: rule(**options), (rule, _frozen(options)), rule.__name__)
    if isinstance(rule, nn.Module):
        raise ConversionError(f"rule must be a name, a Rule class or a function, got the module {type(rule).__name__}: pass its class")
    if callable(rule):
        if options:
            raise ConversionError(f"a function has no options, got {', '.join(options)}")
        return _Choice(lambda: FunctionRule(rule), (rule,), getattr(rule, "__name__", "function"))
    raise ConversionError(f"rule must be a name, a Rule class, a function W -> B or a mapping of these, got {rule!r}")


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in options.items()))


def _present_rule(site: _Site) -> nn.Module | None:
    if not isinstance(site.module, FeedbackLayer):
        return None
    present = site.module._modules.get("feedback")
    if isinstance(present, nn.ModuleDict):
        return present[site.attribute] if site.attribute in present else None
    return present


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def _fans(site: _Site, weight: Tensor) -> tuple[int, int]:
    """N_in, N_out: connections into a unit going forward and going backward (section 5.1)."""
    kernel = weight[0, 0].numel() if weight.dim() > 2 else 1
    first, second = weight.shape[:2]
    groups = getattr(site.module, "groups", 1) if isinstance(site.module, CONVERTIBLE) else 1
    if isinstance(site.module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return first // groups * kernel, second * kernel
    return second * kernel, first // groups * kernel


# ---------------------------------------------------------------- doing it


def _apply(model: nn.Module, plan: Sequence[tuple[_Site, Rule | None, str | None]]) -> None:
    revert(model)
    for site, rule, _ in plan:
        if rule is None:
            continue
        _swap(site.module)
        if not site.own:
            site.module.feedback = rule
        elif "feedback" in site.module._modules:
            site.module.feedback[site.attribute] = rule
        else:
            site.module.feedback = nn.ModuleDict({site.attribute: rule})
    for module in list(_modules(model).values()):
        weights = functional_weights(module)
        if weights and any(_functional_weight(module, name)[2] is not None for name in weights):
            _swap(module)
            module.functional_weights = weights


def _swap(module: nn.Module) -> None:
    if not isinstance(module, FeedbackLayer):
        module.__class__ = _with_feedback(module)
        module.feedback_enabled = True
        module.functional_weights = None


def _revert_layer(layer: FeedbackLayer) -> None:
    layer.__class__ = _without_feedback(type(layer))
    layer._modules.pop("feedback", None)
    for attribute in ("feedback_enabled", "functional_weights"):
        del layer.__dict__[attribute]


def _describe(site: _Site, rule: Rule | None, reason: str | None) -> LayerReport:
    shape = tuple(site.weight().shape) if site.attribute else ()
    memory = sum(b.numel() * b.element_size() for b in rule.buffers()) if rule is not None else 0
    return LayerReport(site.name, site.type.__name__, shape, rule.label if rule is not None else "", memory, reason)


def _nothing_converted(plan: Sequence[tuple[_Site, Rule | None, str | None]]) -> str:
    if not plan:
        return "nothing to convert: the model has no linear or convolution layer"
    reasons = sorted({reason for _, _, reason in plan if reason})
    return f"nothing converted: all {len(plan)} layers were left out ({'; '.join(reasons)})"
