"""Feedback rules: modules that map a weight W to the feedback matrix B. One paper (or family) a file."""

from fahooks.rules.backprop import Backprop, Sham
from fahooks.rules.base import Call, DirectRule, FunctionRule, Rule, list_rules, register_rule
from fahooks.rules.direct import DenseFeedbackAlignment, DirectFeedbackAlignment, DirectRandomTargetProjection
from fahooks.rules.feedback_alignment import FeedbackAlignment
from fahooks.rules.kolen_pollack import KolenPollack
from fahooks.rules.noise import NoisyBackprop
from fahooks.rules.passes import IGNORED, targets
from fahooks.rules.sign_symmetry import (
    SignSymmetry,
    SignSymmetryFixedMagnitude,
    SignSymmetryInit,
    SignSymmetryNormalized,
    SignSymmetryRandomMagnitude,
)
from fahooks.rules.weight_mirror import WeightMirror

__all__ = [
    "IGNORED",
    "Backprop",
    "Call",
    "DenseFeedbackAlignment",
    "DirectFeedbackAlignment",
    "DirectRandomTargetProjection",
    "DirectRule",
    "FeedbackAlignment",
    "FunctionRule",
    "KolenPollack",
    "NoisyBackprop",
    "Rule",
    "Sham",
    "SignSymmetry",
    "SignSymmetryFixedMagnitude",
    "SignSymmetryInit",
    "SignSymmetryNormalized",
    "SignSymmetryRandomMagnitude",
    "WeightMirror",
    "list_rules",
    "register_rule",
    "targets",
]
