"""Registries: how everything that has a name in fahooks gets that name.

One `Registry` holds one kind of thing (rules, hooks, models, datasets, augmentations, loaders, adapters). An entry describes
itself, so that help texts and tables are generated from it. Another package adds entries through the entry point group
`fahooks.plugins`:

    [project.entry-points."fahooks.plugins"]
    my_rules = "my_package.rules"          # importing this module registers what it defines
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

GROUP = "fahooks.plugins"

T = TypeVar("T", bound=Callable[..., Any])


class InputError(ValueError):
    """What the user gave is wrong: the message is one line that says what, what was given, and what to do."""


class Failed(RuntimeError):
    """Something could not go on, through no fault of what the user gave: the message is one line, with what to do."""


class UnknownName(InputError):
    """No entry of that name is registered."""


class NameClash(InputError):
    """Two packages register different things under one name."""


class PluginWarning(UserWarning):
    """A plugin could not be loaded and was skipped."""


@dataclass(frozen=True)
class Entry:
    """A registered thing and how it describes itself.

    Arguments:
        kind: what it is, e.g. "rule".
        name: what a user types.
        target: the class or function that the name stands for.
        summary: one line for tables and help.
        paper: where it was published, with a link; empty where it was not.
        package: the top-level package that registered it.
        options: option names and their defaults; a required option has the default `inspect.Parameter.empty`.
    """

    kind: str
    name: str
    target: Callable[..., Any]
    summary: str
    paper: str
    package: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def build(self, *args: Any, **options: Any) -> Any:
        """Call the target with `options`.

        Raises:
            InputError: an option that the entry does not have, or a required one that is missing.
        """
        for option in options:
            if option not in self.options:
                raise InputError(f"{self.kind} {self.name!r} has no option {option!r}{near(option, self.options)}")
        missing = [o for o, default in self.options.items() if default is inspect.Parameter.empty and o not in options]
        if missing:
            raise InputError(f"{self.kind} {self.name!r} needs {', '.join(missing)}")
        return self.target(*args, **options)


class Registry:
    """The named things of one kind.

    Arguments:
        kind: the singular noun used in messages, e.g. "rule".
        home: the module whose import registers the built-in entries.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind = kind
        self.home = home
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, summary: str = "", paper: str = "") -> Callable[[T], T]:
        """Decorate a class or function to make it known as `name`.

        Arguments:
            name: what users will type.
            summary: one line; by default the first line of the docstring.
            paper: the publication, with a link.

        Raises:
            NameClash: `name` already stands for something else.
        """

        def decorate(target: T) -> T:
            entry = Entry(
                kind=self.kind,
                name=name,
                target=target,
                summary=summary or _first_line(target),
                paper=paper,
                package=target.__module__.partition(".")[0],
                options=_options(target),
            )
            known = self._entries.get(name)
            if known is not None and _origin(known.target) != _origin(target):
                raise NameClash(
                    f"{self.kind} {name!r} is registered twice, by the packages {known.package!r} and {entry.package!r}: "
                    f"uninstall one of them or rename its {self.kind}"
                )
            self._entries[name] = entry
            return target

        return decorate

    def get(self, name: str) -> Entry:
        """Look `name` up.

        Raises:
            UnknownName: nothing is registered under it; the message has the names that came close.
        """
        entries = self._loaded()
        if name not in entries:
            raise UnknownName(f"no {self.kind} is named {name!r}{near(name, entries)}; `fahooks ls {self.kind}s` lists all")
        return entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._loaded())

    def __iter__(self) -> Iterator[Entry]:
        entries = self._loaded()
        return (entries[name] for name in sorted(entries))

    def __contains__(self, name: object) -> bool:
        return name in self._loaded()

    def _loaded(self) -> dict[str, Entry]:
        importlib.import_module(self.home)
        load_plugins()
        return self._entries


rules = Registry("rule", home="fahooks.rules")
hooks = Registry("hook", home="fahooks.hooks")
models = Registry("model", home="fahooks.models")
datasets = Registry("dataset", home="fahooks.data")
augmentations = Registry("augmentation", home="fahooks.data")
loaders = Registry("loader", home="fahooks.data")
adapters = Registry("adapter", home="fahooks.adapters")

_plugins_loaded = False


def load_plugins() -> None:
    """Import every installed plugin once.

    A plugin whose import fails is named in a `PluginWarning` and skipped.

    Raises:
        NameClash: a plugin registers a name that another package holds.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except NameClash:
            _plugins_loaded = False
            raise
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            warnings.warn(
                f"plugin {point.name!r} of package {package!r} was skipped: {type(error).__name__}: {error}",
                PluginWarning,
                stacklevel=2,
            )


def near(name: str, known: Iterable[str]) -> str:
    """A clause for an error message with the known names closest to `name`, empty where none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [k for k in known if name and name.lower() in k.lower() and k not in close][: 3 - len(close)]
    return f" - did you mean {', '.join(map(repr, close))}?" if close else ""


def _first_line(target: Callable[..., Any]) -> str:
    return (inspect.getdoc(target) or "").partition("\n")[0]


def _origin(target: Callable[..., Any]) -> tuple[str, str]:
    return target.__module__, target.__qualname__


def _options(target: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
