"""Doing it and undoing it: convert, revert, and rules switched off for a while."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy

from fahooks.plugins import check_type
from fahooks.rules.base import Rule, check_model
from fahooks.rules.passes import Passes, WholeModelRule, passes_of
from fahooks.surgery.choice import Choice, RuleLike, rule_chooser
from fahooks.surgery.layer import FeedbackLayer, functional_weight, swap, unswap
from fahooks.surgery.report import BETWEEN_BLOCKS, EXCLUDED, LEFT_BY_BP, NO_PATTERN, LayerReport, Report
from fahooks.surgery.selection import Selector, reasons_unselected
from fahooks.surgery.sites import (
    ConversionError,
    Site,
    check_materialised,
    find_blocks,
    find_sites,
    functional_weights,
    lineage,
    modules_of,
)

Plan: TypeAlias = list[tuple[Site, Rule | None, str | None]]
"""What is to become of each site: its rule, or the reason why it has none."""


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

    A rule is for the error that a layer sends below: the first layer of a network, whose input needs no gradient, sends none, and
    converted alone it leaves every gradient as it is by backpropagation.

    Arguments:
        model: any module. Linear, Conv1d-3d, ConvTranspose1d-3d, their subclasses, nn.MultiheadAttention and every module
            with an adapter are converted. Weights, keys, hooks and parameters' identity stay.
        rule: a registered name, a Rule class, a function W -> B, or an ordered mapping from selectors to any of these (or
            to {"rule": name, **options}); the first selector that matches decides, layers that none matches stay. One that
            decides for no layer is refused, save one that selects every layer: it is for the rest, of which there may be none.
        include: convert only what this selects: a module type or a glob over qualified names ("layer1.*"), which also select
            everything inside such a module, a compiled regex, a function (name, module) -> bool, or a list of these.
        exclude: leave out what this selects.
        seed: every B is drawn from a private generator keyed by (seed, layer name), on the CPU. Layers that share one
            Parameter have different names, so each has its own B.
        rule_options: options of the rule, e.g. `gain=0.5`.

    Returns:
        What was done, layer by layer.

    Raises:
        UnknownName: no such rule.
        ConversionError: nothing to convert, a selector that selects or decides for nothing, lazy layers not yet materialised,
            weights on the meta device, or a scripted model.
        InputError: options that the rule does not take, or an argument of another type.
    """
    check_model(model)
    check_type("seed", seed, Integral, "a whole number")
    sites = list(find_sites(model))
    choose = rule_chooser(rule, rule_options, sites)
    selected = reasons_unselected(sites, include, exclude)
    plan: Plan = []
    named: dict[str, Site] = {}
    between: dict[str, Choice] = {}
    blocks: dict[str, tuple[Site, Choice]] = {}
    for site in sites:
        reason = selected[site.name]
        if reason != EXCLUDED:  # what can not be converted can still be left out as asked
            reason = site.obstacle or reason
        new = None
        if reason is None:
            choice = choose(site)
            check_materialised(site)
            if choice is not None and choice.at:
                found = find_blocks(model, choice.at)
                named |= {block.name: block for block in found}
                between[site.name] = choice
                _claim_blocks(blocks, found, choice, site)
                reason = BETWEEN_BLOCKS
            else:
                new = choice.rule_for(site, seed) if choice else None
                reason = _reason_left(choice, new)
        plan.append((site, new, reason))
    _check_blocks(named.values(), plan)
    _check_at(between, [site.name for site in sites])
    plan += [(block, choice.rule_for_block(block, seed), None) for block, choice in blocks.values()]
    if not any(new for _, new, _ in plan) and not any(reason == LEFT_BY_BP for _, _, reason in plan):
        raise ConversionError(_nothing_converted(plan))
    _apply(model, plan)
    notes = dict.fromkeys(f"{rule.label}: {rule.note}" for _, rule, _ in plan if rule is not None and rule.note)
    return Report([_layer_report(site, new, reason) for site, new, reason in plan], list(notes))


def revert(model: nn.Module) -> None:
    """Undo `convert`: classes, state_dict keys and gradients are as before; a model that was not converted stays as it is."""
    check_model(model)
    _broadcast(model, True)
    for passes in passes_of(model):
        passes.remove()
    for module in list(modules_of(model).values()):
        if isinstance(module, FeedbackLayer):
            unswap(module)


@contextmanager
def backprop(model: nn.Module) -> Iterator[None]:
    """Switch every rule of `model` off for the forward passes inside: their backward gives true gradients.

    Nests, and restores what was before also when the body raises. Activation checkpointing repeats forward passes in the backward
    pass, which then has to be inside as well.
    """
    check_model(model)
    layers = [module for module in modules_of(model).values() if isinstance(module, FeedbackLayer)]
    before = [layer.feedback_enabled for layer in layers]
    for layer in layers:
        layer.feedback_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            if isinstance(layer, FeedbackLayer):
                layer.feedback_enabled = enabled


def feedback_layers(model: nn.Module) -> dict[str, FeedbackLayer]:
    """The converted layers of `model` that hold a rule, by qualified name."""
    return {
        name: module
        for name, module in modules_of(model).items()
        if isinstance(module, FeedbackLayer) and "feedback" in module._modules
    }


def feedback_rules(model: nn.Module) -> dict[str, Rule]:
    """Every rule of `model`, by the name that its weight has in the report."""
    rules = ((site.name, site.rule()) for site in find_sites(model))
    blocks: Any = {name: layer.feedback for name, layer in feedback_layers(model).items() if layer.at_output}
    return {name: rule for name, rule in rules if rule is not None} | blocks


def _reason_left(choice: Choice | None, rule: Rule | None) -> str | None:
    if choice is None:
        return NO_PATTERN
    return None if rule is not None else LEFT_BY_BP


def _claim_blocks(blocks: dict[str, tuple[Site, Choice]], found: Sequence[Site], choice: Choice, site: Site) -> None:
    """Note the blocks among `found` that the layer of `site` lies in, for the choice that was made for it.

    Raises:
        ConversionError: another choice has a block already.
    """
    for block in found:
        if any(module is block.module for module in site.around):
            if blocks.setdefault(block.name, (block, choice))[1] is not choice:
                raise ConversionError(f"at: two rules send errors to {block.name!r}, those of two patterns: name it in one")


def _check_blocks(named: Iterable[Site], plan: Plan) -> None:
    """Refuse a block that is a layer with a rule of its own.

    Raises:
        ConversionError: names the layer.
    """
    modules = {id(block.module) for block in named}
    for site, rule, _ in plan:
        if rule is not None and id(site.module) in modules:
            raise ConversionError(f"at: {site.name!r} is a layer with a rule of its own, {rule.label!r}: name other modules")


def _check_at(between: Mapping[str, Choice], names: Sequence[str]) -> None:
    """Refuse a pattern of blocks that cuts off no layer.

    Arguments:
        between: the choices that send errors to blocks, by the names of the layers that they are made for.
        names: of all layers.

    Raises:
        ConversionError: names the pattern.
    """
    for choice in {id(choice): choice for choice in between.values()}.values():
        for pattern in choice.at:
            inside = [name for name in names if fnmatch.filter(lineage(name), pattern)]
            if not any(between.get(name) is choice for name in inside):
                what = (
                    "all layers in what {} selects have another rule or are left out"
                    if inside
                    else "no layer lies in what {} selects"
                )
                raise ConversionError(f"at: {what.format(repr(pattern))}")


def _apply(model: nn.Module, plan: Plan) -> None:
    revert(model)
    for site, rule, _ in plan:
        if rule is not None:
            site.attach(rule)
    for module in list(modules_of(model).values()):
        if isinstance(module, FeedbackLayer) and module.at_output:
            continue
        weights = functional_weights(module)
        if weights and any(functional_weight(module, name)[2] is not None for name in weights):
            swap(module).functional_weights = weights
    whole = [rule for _, rule, _ in plan if isinstance(rule, WholeModelRule)]
    if whole:
        passes = Passes(model)
        for rule in whole:
            rule.passes = passes
    _broadcast(model, False)


def _broadcast(model: nn.Module, wanted: bool) -> None:
    """Tell DistributedDataParallel, by the attribute that it reads, whether to send the state of rules in each pass.

    It need not: the same seed gives the same B on every rank.
    """
    ours = {id(buffer) for rule in feedback_rules(model).values() for buffer in rule.buffers()}
    names = {name for name, buffer in model.named_buffers() if id(buffer) in ours}
    if names:
        ignored = set(getattr(model, DDP_IGNORES, ()))
        ignored = ignored - names if wanted else ignored | names
        setattr(model, DDP_IGNORES, sorted(ignored))
        if not ignored:
            delattr(model, DDP_IGNORES)


DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def _layer_report(site: Site, rule: Rule | None, reason: str | None) -> LayerReport:
    weight = site.weight() if site.attribute else None
    shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
    label, memory, grows = (rule.label, rule.memory_bytes, rule.grows) if rule is not None else ("", 0, False)
    return LayerReport(site.name, site.plain_type.__name__, shape, label, memory, reason, grows)


def _nothing_converted(plan: Plan) -> str:
    if not plan:
        return "nothing to convert: the model has no linear or convolution layer"
    reasons = sorted({reason for _, _, reason in plan if reason})
    return f"nothing converted: all {len(plan)} layers were left out ({'; '.join(reasons)})"
