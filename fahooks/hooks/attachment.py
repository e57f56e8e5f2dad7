"""Attaching: hooks, and rules that learn, run before and after every step of an optimizer."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fahooks import plugins
from fahooks.hooks.base import Hook, Match
from fahooks.plugins import InputError, check_type
from fahooks.rules.base import Rule, check_model, check_positive
from fahooks.surgery.choice import generator_seed
from fahooks.surgery.selection import selector_test
from fahooks.surgery.sites import Site, find_sites

HookLike: TypeAlias = str | type[Hook] | Hook | Mapping[str, Any]

COMPUTED = "is computed from other parameters (a parametrization or pruning)"

_attached: WeakKeyDictionary[nn.Module, ReferenceType[Attachment]] = WeakKeyDictionary()
"""The attachment of each hook and rule that is at work. It lives as long as its optimizer does."""


class Attachment:
    """What `attach` returns: hooks and rules at work on one optimizer.

    Arguments:
        optimizer: whose steps they follow.
        hooks: each with the weights that it acts on, by layer name.
        rules: each with its weight, by layer name.

    Attributes:
        steps: optimizer steps taken since, skipped ones not counted.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hooks: Sequence[tuple[Hook, Mapping[str, nn.Parameter]]],
        rules: Mapping[str, tuple[Rule, nn.Parameter]],
    ) -> None:
        self.steps = 0
        self.hooks = list(hooks)
        self.rules = dict(rules)
        self._optimizer = optimizer
        self._withheld: list[tuple[Tensor, Tensor]] | None = None
        self._attach_rules()
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        _attached.update(dict.fromkeys(self._parts(), ref(self)))

    def _attach_rules(self) -> None:
        """Attach the rules; where one of them can not be, none is."""
        done: list[tuple[Rule, nn.Parameter]] = []
        try:
            for rule, weight in self.rules.values():
                rule.attach(weight, self._optimizer)
                done.append((rule, weight))
        except InputError:
            for rule, weight in done:
                rule.detach(weight, self._optimizer)
            raise

    def remove(self) -> None:
        """Take all of it off the optimizer, which then steps as it did before `attach`; weights stay as they are."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for rule, weight in self.rules.values():
            rule.detach(weight, self._optimizer)
        for part in self._parts():
            _attached.pop(part, None)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the state of every hook, in order; that of rules is the model's and the optimizer's."""
        names = [_label(hook) for hook, _ in self.hooks]
        return {"steps": self.steps, "names": names, "hooks": [hook.state_dict() for hook, _ in self.hooks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            InputError: it is no such state, or that of other hooks, or of hooks on other weights.
        """
        try:
            given = [(name, sorted(hook)) for name, hook in zip(state["names"], state["hooks"], strict=True)]
            steps = int(state["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("this is no state of what attach returns: give what its state_dict() returned") from error
        own = [(_label(hook), sorted(hook.state_dict())) for hook, _ in self.hooks]
        if given != own:
            raise InputError("the state is that of other hooks, or of hooks on other weights: attach those that it came from")
        for (hook, _), values in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(values)
        self._count(steps)

    def __repr__(self) -> str:
        lines = [f"  {hook} on {', '.join(map(repr, weights))}" for hook, weights in self.hooks]
        lines += [f"  rule {rule} of {name!r}" for name, (rule, _) in self.rules.items()]
        return "\n".join(["Attachment(", *lines, ")"])

    def _parts(self) -> list[nn.Module]:
        return [*(hook for hook, _ in self.hooks), *(rule for rule, _ in self.rules.values())]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        # A fused optimizer is stepped also where its GradScaler found an infinite gradient. Its kernel would leave weights alone,
        # and yet momentum begin there, as memory that was never written, and not for the B of kp, which has no gradient.
        if getattr(optimizer, "found_inf", None):
            self._withheld = list(_take_gradients(optimizer))
            return None
        _unscale(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before_step()
            return None
        wrapped = partial(self._evaluate, closure)
        return ((optimizer, wrapped), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure of a step; only then are there gradients."""
        loss = closure()
        self._before_step()
        return loss

    @torch.no_grad()
    def _before_step(self) -> None:
        for hook, weights in self.hooks:
            hook.before_step(weights)
        # After the hooks: a rule that learns what its weight learns sees the gradient that the weight is moved by.
        for rule, weight in self.rules.values():
            rule.before_step(weight)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self._withheld is not None:
            for parameter, gradient in self._withheld:
                parameter.grad = gradient
            self._withheld = None
            return
        self._count(self.steps + 1)
        for hook, weights in self.hooks:
            hook.after_step(weights)
        for rule, weight in self.rules.values():
            rule.after_step(weight)

    def _count(self, steps: int) -> None:
        self.steps = steps
        for hook, _ in self.hooks:
            hook.steps = steps


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    *hooks: HookLike,
    total_steps: int | None = None,
    seed: int = 0,
    **hook_options: Any,
) -> Attachment:
    """Run hooks, and the rules of `model` that learn, before and after every step of `optimizer`.

        handle = fahooks.attach(model, optimizer, "constant_norm", fahooks.FreezeSigns(after=500))
        handle = fahooks.attach(model, optimizer, "freeze_signs", after=500)

    Weights are changed in place and keep their identity. Any `torch.optim` optimizer will do, fused ones, closures and
    GradScalers included: a step that a scaler skips runs no hook. Only weights that this optimizer updates are acted on.
    Layers whose weight is computed from other parameters (weight_norm and other parametrizations, pruning) are left out.
    Load a checkpoint of the optimizer after attaching, since `kp` gives it parameters, which stay until `remove()`: `revert`
    leaves the optimizer alone. What is attached later comes on top.

    Arguments:
        model: converted beforehand, if at all.
        optimizer: the one that is stepped.
        hooks: each a registered name, a Hook class, a Hook, or {"name": name, **options}. They run in this order: of constraints,
            the last one holds to the last digit. Without any, only the rules that learn are attached, which they are in any case;
            where no rule learns, that is nothing, and a loop over rules need not tell them apart.
        total_steps: optimizer steps of the whole training, for options that are a fraction of it.
        seed: what hooks draw comes from private generators keyed by (seed, hook, layer name).
        hook_options: options of the hook, where just one is given, by name or class.

    Returns:
        The handle: `remove()`, and `state_dict()` and `load_state_dict(state)` for checkpoints.

    Raises:
        UnknownName: no such hook.
        InputError: an argument of another type, options that a hook does not take, a hook that does nothing at a step, or begins
            after the last one, a hook or selector without a weight to act on, a rule that learns on a weight that is no
            parameter, nothing to run although there are rules that learn, or a hook or a rule that is attached already.
    """
    check_model(model)
    check_type("what follows the model", optimizer, Optimizer, "a torch.optim optimizer")
    check_type("seed", seed, Integral, "a whole number")
    if total_steps is not None:
        check_type("total_steps", total_steps, Integral, "a whole number")
        check_positive("total_steps", total_steps)
    sites = list(find_sites(model))
    updated = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    rules = _rules_that_learn(sites, updated)
    if hook_options and (len(hooks) != 1 or isinstance(hooks[0], Hook)):
        raise InputError(
            f"{', '.join(hook_options)}: options can stand here where one hook is given, by name or class; otherwise give "
            "{'name': name, option: value} for each"
        )
    made = [_checked(_make(hook, hook_options)) for hook in hooks]
    if total_steps is not None:
        for hook in made:
            check_begins(hook, total_steps)
    if not made and not rules and any(rule.learns for site in sites if (rule := site.rule()) is not None):
        raise InputError("nothing to attach: no hook is given, and this optimizer updates no weight beside which a rule learns")
    _check_free([*made, *(rule for rule, _ in rules.values())])
    chosen = [(hook, _chosen_sites(hook, sites, updated)) for hook in made]
    parts = [(hook, {name: _parameter(site) for name, site in places.items()}) for hook, places in chosen]
    _initialise(parts, [places for _, places in chosen], total_steps, seed)
    return Attachment(optimizer, parts, rules)


def detach(optimizer: Optimizer) -> None:
    """Take all that `attach` gave to `optimizer` off again, as `remove()` does, also where the handle was lost."""
    owners = {getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()}
    for owner in owners:
        if isinstance(owner, Attachment):
            owner.remove()


@torch.no_grad()
def _initialise(
    parts: Sequence[tuple[Hook, Mapping[str, nn.Parameter]]],
    places: Sequence[Mapping[str, Site]],
    total_steps: int | None,
    seed: int,
) -> None:
    """Let every hook make its state; where one of them can not, weights are as before."""
    before = {weight: weight.clone() for _, weights in parts for weight in weights.values()}
    try:
        for (hook, weights), sites in zip(parts, places, strict=True):
            hook.steps = 0
            hook.forget()
            generator_for = partial(_generator, seed, _label(hook))
            hook.initialise(weights, sites=sites, total_steps=total_steps, generator_for=generator_for)
    except BaseException:
        for weight, value in before.items():
            weight.copy_(value)
        raise


def _check_free(parts: Sequence[nn.Module]) -> None:
    """Refuse a hook or a rule that would act twice.

    Raises:
        InputError: it is there twice, or attached already.
    """
    for part in parts:
        if _is_attached(part) or sum(part is other for other in parts) > 1:
            what = f"this {type(part).__name__} is attached already"
            raise InputError(f"{what}: remove() its handle, fahooks.detach(optimizer), or give all hooks in one call")


def _is_attached(part: nn.Module) -> bool:
    if part in _attached and _attached[part]() is not None:
        gc.collect()  # an optimizer that nobody holds any more takes its attachment with it
    return part in _attached and _attached[part]() is not None


def _make(hook: HookLike, options: Mapping[str, Any]) -> Hook:
    if isinstance(hook, str):
        return plugins.hooks.get(hook).build(**options)
    if isinstance(hook, Mapping):
        if not isinstance(hook.get("name"), str):
            raise InputError(f"expected {{'name': name, option: value, ...}}, got {dict(hook)!r}")
        return plugins.hooks.get(hook["name"]).build(**{k: v for k, v in hook.items() if k != "name"}, **options)
    if isinstance(hook, Hook):
        return hook
    if inspect.isclass(hook) and issubclass(hook, Hook):
        return plugins.describe("hook", hook.__name__, hook).build(**options)
    raise InputError(f"a hook must be a name, a Hook class, a Hook or {{'name': name, option: value}}, got {hook!r}")


def _checked(hook: Hook) -> Hook:
    """Refuse a hook that would do nothing at a step.

    Raises:
        InputError: names its class.
    """
    kind, own = type(hook), vars(hook).keys()
    if kind.before_step is Hook.before_step and kind.after_step is Hook.after_step and not own & {"before_step", "after_step"}:
        methods = "before_step(weights) and after_step(weights)"
        raise InputError(f"hook {_label(hook)!r} does nothing: of a fahooks.Hook's methods {methods} it has neither")
    return hook


def check_begins(hook: Hook, total_steps: int) -> None:
    """Refuse a hook that would have no part in any of `total_steps`, which is all of the training.

    Raises:
        InputError: says when it would begin.
    """
    if (first := hook.begins(total_steps)) > total_steps:
        raise InputError(
            f"hook {_label(hook)!r} does nothing: it begins at step {first:,}, and training has no more than {total_steps:,}"
        )


def _label(hook: Hook) -> str:
    """The name that a hook is registered by, or else that of its class."""
    return next((entry.name for entry in plugins.hooks if entry.target is type(hook)), type(hook).__name__)


def _generator(seed: int, label: str, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(generator_seed(seed, f"{label}/{name}"))


def _rules_that_learn(sites: Sequence[Site], updated: set[int]) -> dict[str, tuple[Rule, nn.Parameter]]:
    """The rules with a part of their own in a step, whose weights are `updated`."""
    found: dict[str, tuple[Rule, nn.Parameter]] = {}
    for site in sites:
        rule = site.rule()
        if rule is None or not rule.learns:
            continue
        weight = site.module._parameters.get(site.attribute)
        if weight is None:
            raise InputError(f"layer {site.name!r}: rule {rule.label!r} learns beside a weight, and this one {COMPUTED}")
        if id(weight) in updated:
            found[site.name] = rule, weight
    return found


def _chosen_sites(hook: Hook, sites: Sequence[Site], updated: set[int]) -> dict[str, Site]:
    """The sites of the weights that a hook acts on, by name; a shared weight once.

    Raises:
        InputError: a selector, or the hook as a whole, is left without any.
    """
    label = _label(hook)
    chosen: set[str] = set()
    for what, selected in _selections(hook.match, sites, label):
        reasons = {site.name: _reason_left(site, updated) for site in selected}
        if all(reasons.values()):
            examples = {reason: name or "the model" for name, reason in reversed(reasons.items())}
            why = "; ".join(f"{name}: {reason}" for reason, name in examples.items())
            raise InputError(f"hook {label!r}: {what} leaves no weight to act on ({why or 'it has no such layer'})")
        chosen |= {name for name, reason in reasons.items() if reason is None}
    first: dict[int, Site] = {}
    for site in sites:
        if site.name in chosen:
            first.setdefault(id(_parameter(site)), site)
    return {site.name: site for site in first.values()}


def _selections(match: Match, sites: Sequence[Site], label: str) -> Iterator[tuple[str, list[Site]]]:
    """What each selector selects, and how messages call it."""
    if match is None:
        usable = [site for site in sites if site.obstacle is None]
        yield "this model", [site for site in usable if site.rule() is not None] or usable
        return
    for selector in match if isinstance(match, list | tuple) else [match]:
        test = selector_test(selector, sites, f"hook {label!r}: match")
        yield f"match={selector!r}", [site for site in sites if test(site)]


def _reason_left(site: Site, updated: set[int]) -> str | None:
    """Why a hook can not act on the weight of `site`; None where it can."""
    if site.obstacle is not None:
        return site.obstacle
    weight = site.module._parameters.get(site.attribute)
    if weight is None:
        return f"its weight {COMPUTED}"
    if id(weight) not in updated:
        return "this optimizer does not update its weight"
    if is_lazy(weight):
        raise InputError(f"layer {site.name!r} has no shape yet: run one batch through the model, then attach")
    return None


def _parameter(site: Site) -> nn.Parameter:
    parameter: Any = site.module._parameters[site.attribute]
    return parameter


def _take_gradients(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Take every gradient away, and tell whose it was: without any, no optimizer does anything."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter, parameter.grad
                parameter.grad = None


@torch.no_grad()
def _unscale(optimizer: Any) -> None:
    """Do at once what a fused optimizer's kernel would do: divide the gradients by the GradScaler's factor."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None
