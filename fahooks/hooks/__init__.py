"""Hooks: weight constraints and gradient transforms that attach to a torch optimizer. One subject a file."""

from fahooks.hooks.alignment import Alignment
from fahooks.hooks.attachment import Attachment, attach, detach
from fahooks.hooks.base import Hook, list_hooks, register_hook
from fahooks.hooks.constant_norm import ConstantNorm
from fahooks.hooks.dale import Dale
from fahooks.hooks.freeze_signs import FreezeSigns
from fahooks.hooks.manhattan import Manhattan

__all__ = [
    "Alignment",
    "Attachment",
    "ConstantNorm",
    "Dale",
    "FreezeSigns",
    "Hook",
    "Manhattan",
    "attach",
    "detach",
    "list_hooks",
    "register_hook",
]
