"""Dale's law: all outgoing weights of a unit have one sign (Moskovitz et al. 2018, section 5.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fahooks.hooks.base import Hook, Match, register_hook
from fahooks.hooks.freeze_signs import check_margin, keep_side
from fahooks.plugins import InputError
from fahooks.surgery.sites import CONVERTIBLE, Site


@register_hook("dale", paper="Moskovitz et al. 2018, section 5.5, https://arxiv.org/abs/1812.06488")
class Dale(Hook):
    """Within a layer every outgoing weight of a unit keeps that unit's sign, from the start on.

    The units of a layer are its inputs: column j of a linear layer's W, the weights of one input channel of a convolution. When
    it is attached, weights of the wrong sign are mirrored, so that norms stay. An image's channels are units too: leave the first
    layer out with `match` where they should be free.

    Arguments:
        excitatory: None, for units of the sign that the sum of their outgoing weights has; or a number from 0 to 1: that fraction
            of each layer's units, drawn at random, is excitatory (positive) and the others are inhibitory.
        margin: how far from zero a weight is kept; at least the smallest normal number of its dtype.
        match: see `fahooks.Hook`.

    Raises:
        InputError: `excitatory` or `margin` is no such number.
    """

    def __init__(self, *, excitatory: float | None = None, margin: float = 1e-8, match: Match = None) -> None:
        super().__init__(match=match)
        if excitatory is not None and not (isinstance(excitatory, int | float) and 0 <= excitatory <= 1):
            raise InputError(f"excitatory must be a number from 0 to 1, or None, got {excitatory!r}")
        check_margin(margin)
        self.excitatory = excitatory
        self.margin = margin

    def initialise(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        sites: Mapping[str, Site],
        generator_for: Callable[[str], torch.Generator],
        **about: Any,
    ) -> None:
        """Choose the units' signs and mirror the weights that have the other."""
        for name, weight in weights.items():
            outgoing = sum_outgoing(weight, sites[name])
            if self.excitatory is None:
                signs = torch.where(outgoing < 0, -1, 1)
            else:
                order = torch.randperm(outgoing.numel(), generator=generator_for(name)).to(weight.device)
                signs = torch.where(order < round(self.excitatory * order.numel()), 1, -1).view_as(outgoing)
            side = by_weight(signs.to(weight.dtype), weight)
            self.remember(name, side)
            weight.copy_(weight.abs() * side)
        self.after_step(weights)

    def after_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Clip the weights that crossed zero."""
        for name, weight in weights.items():
            keep_side(weight, self.recall(name), self.margin)

    def extra_repr(self) -> str:
        """The options."""
        return f"excitatory={self.excitatory}, margin={self.margin}"


def sum_outgoing(weight: Tensor, site: Site) -> Tensor:
    """The sum of each unit's outgoing weights.

    Arguments:
        weight: W, [out, in] or [out, in / groups, kernel ...]; of a transposed convolution [in, out / groups, kernel ...].
        site: where it is.

    Returns:
        [groups, 1, in / groups, 1 ...]; [in, 1 ...] of a transposed convolution, and of a linear map that keeps W as [in, out].
    """
    layer = site.module
    if site.transposed or isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return weight.sum(dim=tuple(range(1, weight.dim())), keepdim=True)
    groups = getattr(layer, "groups", 1) if isinstance(layer, CONVERTIBLE) else 1
    grouped = weight.unflatten(0, (groups, -1))
    return grouped.sum(dim=(1, *range(3, grouped.dim())), keepdim=True)


def by_weight(signs: Tensor, weight: Tensor) -> Tensor:
    """What `sum_outgoing` has for units, in a shape that broadcasts to the weight's."""
    if signs.dim() == weight.dim():
        return signs
    groups = signs.shape[0]
    return signs.squeeze(1).repeat_interleave(weight.shape[0] // groups if groups > 1 else 1, dim=0)
