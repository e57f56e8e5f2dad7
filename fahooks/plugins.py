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
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

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


class Doubtful(UserWarning):
    """What the user asked for is done, and does nothing, or not what was meant."""


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
            InputError: as `check`.
        """
        self.check(options)
        return self.target(*args, **options)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that do not fit the signature of the target and its annotations.

        Raises:
            InputError: an option that the entry does not have, a value of another type, or a required option that is missing.
        """
        what = f"{self.kind} {self.name!r}"
        for option in options:
            if option not in self.options and not self.takes_any:
                raise InputError(f"{what} has no option {option!r}{near(option, self.options)}")
        missing = [o for o, default in self.options.items() if default is inspect.Parameter.empty and o not in options]
        if missing:
            noun = "option" if len(missing) == 1 else "options"
            raise InputError(f"{what} needs the {noun} {', '.join(map(repr, missing))}")
        if not options:
            return
        from pydantic import ValidationError

        try:
            self.schema.model_validate(dict(options))
        except ValidationError as error:
            wrong: dict[str, list[str]] = {}
            for detail in error.errors():
                wrong.setdefault(str(detail["loc"][0]), []).append(worded(detail))
            problems = [f"{option} {either(words)} (got {_brief(options[option])})" for option, words in wrong.items()]
            raise InputError(f"{what}: {'; '.join(problems)}") from error

    @property
    def takes_any(self) -> bool:
        """Whether the target hands options that its signature does not name on, to a base class for one."""
        kinds = {p.kind for p in inspect.signature(self.target).parameters.values()}
        # nn.Module's own (*args, **kwargs), which a rule without __init__ has, takes nothing.
        return inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds

    @cached_property
    def schema(self) -> type[BaseModel]:
        """The options with their annotations; what pydantic can not check, or Python not resolve, may be anything."""
        from pydantic import ConfigDict, PydanticUserError, TypeAdapter, create_model

        try:
            hints = get_type_hints(self.target.__init__ if inspect.isclass(self.target) else self.target)
        except NameError:  # a name that is imported for type checkers only
            hints = {}
        config = ConfigDict(
            extra="allow" if self.takes_any else "forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=()
        )
        fields: dict[str, Any] = {}
        for name, default in self.options.items():
            hint = _lists_or_tuples(hints.get(name, Any))
            try:
                TypeAdapter(hint, config=config)
            except PydanticUserError:
                hint = Any
            fields[name] = (hint, ... if default is inspect.Parameter.empty else default)
        return create_model(f"options of {self.name}", __config__=config, **fields)


def check_type(what: str, value: object, kind: type, words: str) -> None:
    """Refuse an argument that is not of type `kind`; a truth value is no number.

    Raises:
        InputError: `what` must be `words`, and what was given.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{what} must be {words}, got {_brief(value)}")


def describe(kind: str, name: str, target: Callable[..., Any], *, summary: str = "", paper: str = "") -> Entry:
    """The entry of something that is not registered, or not yet.

    Raises:
        InputError: Python knows no signature of `target`.
    """
    try:
        options = _options(target)
    except (ValueError, TypeError) as error:
        raise InputError(f"{kind} {name!r}: {target!r} has no signature that could say what its options are") from error
    package = target.__module__.partition(".")[0]
    return Entry(kind, name, target, summary or _first_line(target), paper, package, options)


class Registry:
    """The named things of one kind.

    Arguments:
        kind: the singular noun used in messages, e.g. "rule".
        home: the module whose import registers the built-in entries.

    Attributes:
        base: the class that every target must be a subclass of; its home sets it. None where any function or class will do.
    """

    base: type | None = None

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
            InputError: it is of no kind that can be registered here, or no name is given.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            what = f"register_{self.kind}" if self.kind in ("rule", "hook", "adapter") else f"plugins.{self.kind}s.register"
            raise InputError(f"write @fahooks.{what}('name'), with the name that users will type (got {_brief(name)})")

        def decorate(target: T) -> T:
            if self.base is not None and self.base not in getattr(target, "__mro__", ()):
                raise InputError(f"{self.kind} {name!r} must be a subclass of fahooks.{self.base.__name__}, got {_brief(target)}")
            entry = describe(self.kind, name, target, summary=summary, paper=paper)
            known = self._entries.get(name)
            if known is not None and _origin(known.target) != _origin(target):
                raise NameClash(self._clash(known, entry))
            self._entries[name] = entry
            return target

        return decorate

    def _clash(self, known: Entry, entry: Entry) -> str:
        twice = f"{self.kind} {entry.name!r} is registered twice"
        if known.package == entry.package:
            return f"{twice}, for {'.'.join(_origin(known.target))} and {'.'.join(_origin(entry.target))}: rename one of them"
        return (
            f"{twice}, by the packages {known.package!r} and {entry.package!r}: uninstall one of them or rename its {self.kind}"
        )

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
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist else point.value
            warnings.warn(
                f"plugin {point.name!r} of package {package!r} was skipped: {one_line(error)}",
                PluginWarning,
                stacklevel=2,
            )


def one_line(error: BaseException) -> str:
    """The class of an error, and its words if it has any."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def escaped(text: str) -> str:
    """`text` as one line, with escapes for what can not be printed, such as names of files that are no UTF-8."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def near(name: str, known: Iterable[str]) -> str:
    """A clause for an error message with the known names closest to `name`, one alone that differs in case only; else empty."""
    known = list(known)
    if same := [k for k in known if k.lower() == name.lower()]:
        return f" - did you mean {same[0]!r}?"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [k for k in known if name and name.lower() in k.lower() and k not in close][: 3 - len(close)]
    return f" - did you mean {', '.join(map(repr, close))}?" if close else ""


def worded(detail: ErrorDetails) -> str:
    """What pydantic has against a value, in words that begin with "must" or "is missing"."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        return "is missing"
    if kind == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"must be one of {', '.join(map(repr, choices))}" + near(str(context["tag"]), choices)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be {context['expected']}" + near(str(detail["input"]), choices)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys to values"
    if kind in ("too_short", "too_long"):
        what, count = ("at least", context["min_length"]) if kind == "too_short" else ("at most", context["max_length"])
        return f"must have {what} {count} {'entry' if count == 1 else 'entries'}"
    if kind == "tuple_type":
        return "must be a list"
    if kind == "string_pattern_mismatch":
        return "must be words of letters, digits, '.', '_' and '-', joined by '/'"
    words = detail["msg"].replace("Input should be", "must be").replace("Input should", "must")
    return re.sub(r"\ba valid (?=[aeiou])", "an ", words).replace("a valid ", "a ")


def either(wordings: Iterable[str]) -> str:
    """What the branches of a union have against one value, as one clause."""
    first, *others = dict.fromkeys(wordings)
    return " or ".join([first, *(words.removeprefix("must be ") for words in others)])


def _lists_or_tuples(hint: Any) -> Any:
    """`hint`, with tuples welcome where it says list, and the other way round."""
    from pydantic import Field

    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_lists_or_tuples, get_args(hint)))]  # noqa: UP007
    return Annotated[hint, Field(strict=False)] if get_origin(hint) in (list, tuple, set, frozenset) else hint


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(target: Callable[..., Any]) -> str:
    return (inspect.getdoc(target) or "").partition("\n")[0]


def _origin(target: Callable[..., Any]) -> tuple[str, str]:
    return target.__module__, target.__qualname__


def _options(target: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
