"""What: the rule that a user chose, by name, class, function or mapping, and the making of it for one weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fahooks import plugins
from fahooks.rules.backprop import Backprop
from fahooks.rules.base import DirectRule, FunctionRule, Rule
from fahooks.rules.direct import FromOutput
from fahooks.surgery.selection import deciding_test
from fahooks.surgery.sites import CONVERTIBLE, ConversionError, Site

RuleLike: TypeAlias = "str | type[Rule] | Callable[[Tensor], Tensor] | Mapping[Any, Any]"


@dataclass(frozen=True)
class Choice:
    """A rule as the user chose it, before it is made for a layer."""

    make: Callable[[], Rule]
    identity: tuple[Any, ...]
    label: str

    @cached_property
    def at(self) -> list[str]:
        """Patterns of the blocks whose outputs the error is sent to; empty for rules that serve layers."""
        if not (isinstance(self.identity[0], type) and issubclass(self.identity[0], FromOutput)):
            return []
        at: Any = cast(Any, self.make()).at
        return [at] if isinstance(at, str) else list(at or [])

    def rule_for(self, site: Site, seed: int) -> Rule | None:
        """The rule for one site: the one it has if that came from the same choice, else a new one; None for backprop."""
        if self.identity[0] is Backprop:
            return None
        weight = site.weight().detach()
        origin = (*self.identity, seed, site.name, weight.shape)
        fan_in, fan_out = fans(site, weight)
        return self._made(site, origin, seed, weight, fan_in, fan_out)

    def rule_for_block(self, block: Site, seed: int) -> Rule:
        """The rule that sends its error to the output of a block; the one it has if that came from the same choice."""
        return self._made(block, (*self.identity, seed, block.name, "output"), seed, torch.empty(0), 1, 1)

    def _made(self, site: Site, origin: tuple[Any, ...], seed: int, weight: Tensor, fan_in: int, fan_out: int) -> Rule:
        present = site.rule()
        if present is not None and _same(present.origin, origin):
            return present
        rule = self.make()
        generator = torch.Generator().manual_seed(generator_seed(seed, site.name))
        rule.initialise(weight, fan_in=fan_in, fan_out=fan_out, generator=generator)
        rule.name = site.name
        rule.weight_shape = weight.shape
        rule.label = self.label
        rule.origin = origin
        return rule.train(site.module.training)


def rule_chooser(rule: Any, options: Mapping[str, Any], sites: Sequence[Site]) -> Callable[[Site], Choice | None]:
    """What tells the rule of each site; None where a mapping of rules has no selector for it.

    Raises:
        ConversionError: `rule` or `options` are of no form that `convert` takes, or a selector selects nothing, or
            nothing that those before it leave.
    """
    if not isinstance(rule, Mapping) or "rule" in rule:
        choice = _choice(rule, options)
        return lambda site: choice
    if options:
        raise ConversionError(
            f"options {', '.join(options)} belong beside a rule, as {{pattern: {{'rule': name, option: value}}}}, "
            "where rule is a mapping"
        )
    if not rule:
        raise ConversionError("the mapping of rules is empty")
    tests: list[tuple[Any, Callable[[Site], bool]]] = []
    for selector in rule:
        tests.append((selector, deciding_test(selector, tests, sites, "rule")))
    choices = [_choice(value, {}) for value in rule.values()]
    return lambda site: next((choice for (_, test), choice in zip(tests, choices, strict=True) if test(site)), None)


def _choice(rule: Any, options: Mapping[str, Any]) -> Choice:
    if isinstance(rule, Mapping):
        if "rule" not in rule:
            raise ConversionError(f"expected {{'rule': name, option: value, ...}}, got {dict(rule)!r}")
        return _choice(rule["rule"], {**{k: v for k, v in rule.items() if k != "rule"}, **options})
    if isinstance(rule, str):
        return _choice_of(plugins.rules.get(rule), options)
    if isinstance(rule, type) and issubclass(rule, Rule):
        return _choice_of(plugins.describe("rule", rule.__name__, rule), options)
    if isinstance(rule, nn.Module):
        raise ConversionError(
            f"rule must be a name, a Rule class or a function, got the module {type(rule).__name__}: pass its class"
        )
    if isinstance(rule, type):
        raise ConversionError(f"rule must be a name, a Rule class or a function, got the class {rule.__name__}, which is no Rule")
    if callable(rule):
        if options:
            raise ConversionError(f"a function has no options, got {', '.join(options)}")
        function: Any = rule
        return Choice(lambda: FunctionRule(function), (rule,), getattr(rule, "__name__", "function"))
    raise ConversionError(f"rule must be a name, a Rule class, a function W -> B or a mapping of these, got {rule!r}")


def _choice_of(entry: plugins.Entry, options: Mapping[str, Any]) -> Choice:
    rule: Any = entry.target
    direct = issubclass(rule, DirectRule)
    if rule.around is DirectRule.around if direct else rule.forward is Rule.forward:
        missing = "DirectRule has a method around(call, input)" if direct else "fahooks.Rule has a method forward(weight)"
        raise ConversionError(f"rule {entry.name!r} does not say what it sends back: a subclass of {missing}")
    if "_modules" not in vars(entry.build(**options)):
        raise ConversionError(f"rule {entry.name!r}: the __init__ of {rule.__name__} must begin with super().__init__()")
    return Choice(lambda: rule(**options), (rule, *_flat(options)), entry.name)


def _flat(options: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(part for name in sorted(options) for part in (name, options[name]))


def _same(origin: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two origins agree; values that can not say so in one word, such as tensors, agree only if they are one object."""
    return len(origin) == len(other) and all(a is b or (a == b) is True for a, b in zip(origin, other, strict=True))


def generator_seed(seed: int, name: str) -> int:
    """The seed of a private generator keyed by `seed` and `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def fans(site: Site, weight: Tensor) -> tuple[int, int]:
    """N_in, N_out: connections into a unit going forward and going backward (section 5.1)."""
    kernel = weight[0, 0].numel() if weight.dim() > 2 else 1
    first, second = weight.shape[:2]
    groups = getattr(site.module, "groups", 1) if isinstance(site.module, CONVERTIBLE) else 1
    if isinstance(site.module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return first // groups * kernel, second * kernel
    if site.transposed:
        return first, second
    return second * kernel, first // groups * kernel
