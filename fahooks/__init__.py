"""fahooks: feedback alignment for any PyTorch model."""

from fahooks.adapters import register_adapter as register_adapter
from fahooks.audit import audit as audit
from fahooks.hooks import Alignment as Alignment
from fahooks.hooks import ConstantNorm as ConstantNorm
from fahooks.hooks import Dale as Dale
from fahooks.hooks import FreezeSigns as FreezeSigns
from fahooks.hooks import Hook as Hook
from fahooks.hooks import Manhattan as Manhattan
from fahooks.hooks import attach as attach
from fahooks.hooks import detach as detach
from fahooks.hooks import list_hooks as list_hooks
from fahooks.hooks import register_hook as register_hook
from fahooks.probes import probe as probe
from fahooks.rules import Rule as Rule
from fahooks.rules import list_rules as list_rules
from fahooks.rules import register_rule as register_rule
from fahooks.rules import targets as targets
from fahooks.surgery import ConversionError as ConversionError
from fahooks.surgery import backprop as backprop
from fahooks.surgery import convert as convert
from fahooks.surgery import revert as revert
