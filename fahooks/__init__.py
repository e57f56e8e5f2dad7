"""fahooks: feedback alignment for any PyTorch model."""

from fahooks.adapters import register_adapter as register_adapter
from fahooks.audit import audit as audit
from fahooks.probes import probe as probe
from fahooks.rules import Rule as Rule
from fahooks.rules import list_rules as list_rules
from fahooks.rules import register_rule as register_rule
from fahooks.surgery import ConversionError as ConversionError
from fahooks.surgery import backprop as backprop
from fahooks.surgery import convert as convert
from fahooks.surgery import revert as revert
