"""fahooks: feedback alignment for any PyTorch model."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fahooks.adapters import register_adapter as register_adapter
    from fahooks.auditing import audit as audit
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

# Where the public names are at home. They are imported when one of them is first used: torch, which all of them need, takes
# seconds to import, and `fahooks --help` has no use for it.
_HOMES = {
    "adapters": "register_adapter",
    "auditing": "audit",
    "hooks": "Alignment ConstantNorm Dale FreezeSigns Hook Manhattan attach detach list_hooks register_hook",
    "probes": "probe",
    "rules": "Rule list_rules register_rule targets",
    "surgery": "ConversionError backprop convert revert",
}
_MODULES = ("data", "functional", "models", "observation", "plugins", "recipe", "reference", "report", "training", "verify")
__all__ = [name for names in _HOMES.values() for name in names.split()]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # which would take a module with __getattr__ to have every name

    def __getattr__(name: str) -> object:
        if name in (*_HOMES, *_MODULES):
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for home, names in _HOMES.items():
            module = import_module(f"{__name__}.{home}")
            globals().update({public: getattr(module, public) for public in names.split()})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
