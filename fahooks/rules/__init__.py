"""Feedback rules: modules that map a weight W to the feedback matrix B. One paper (or family) a file."""

from fahooks.rules.backprop import Backprop, Sham
from fahooks.rules.base import FunctionRule, Rule, list_rules, register_rule
from fahooks.rules.feedback_alignment import FeedbackAlignment
from fahooks.rules.sign_symmetry import SignSymmetry, SignSymmetryInit, SignSymmetryNormalized

__all__ = [
    "Backprop",
    "FeedbackAlignment",
    "FunctionRule",
    "Rule",
    "Sham",
    "SignSymmetry",
    "SignSymmetryInit",
    "SignSymmetryNormalized",
    "list_rules",
    "register_rule",
]
