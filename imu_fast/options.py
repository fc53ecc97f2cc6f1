"""Choices as objects: frozen, keyword-only, and with exactly the options that they use.

A method, a curvature, a loss, a scope is an object, ``GGN(damping=1e-3)``; its name, ``"ggn"``, is
short for the object with its defaults. Doors that take a name also take options flat,
``curvature="ggn", damping=1e-3``: each goes to the object that has it, at whatever depth, and one
that no object has is an error that lists those that are there. So nothing that is passed is
ignored, and what cannot be combined cannot be written.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar, overload

from typing_extensions import Self, dataclass_transform

from imu_fast.errors import InputError

T = TypeVar("T", bound="Options")
N = TypeVar("N", bound=str)
Check = Callable[[str, Any], Any]


def option(
    *, default: Any = dataclasses.MISSING, check: Check | None = None, also: str = ""
) -> Any:
    """A field of a choice.

    Args:
        default: without one, the option must be given.
        check: ``(name, value)``, raises InputError for a bad value.
        also: a second name among flat options.
    """
    return dataclasses.field(default=default, metadata={"check": check, "also": also})


class Table(Generic[T]):
    """The names of one kind of choice.

    Args:
        kind: the keyword under which users pass it, such as ``"curvature"``.
        base: the class of every entry.
        entries: name -> what makes the object with its defaults.
        coerce: for what users pass that is neither a name nor such an object (a tensor, a torch
            optimizer): the object that holds it, or None.
    """

    def __init__(
        self,
        kind: str,
        base: type[T],
        entries: Mapping[str, Callable[[], T]],
        coerce: Callable[[Any], T | None] = lambda value: None,
    ) -> None:
        self.kind, self.base, self._entries, self._coerce = kind, base, dict(entries), coerce

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]()

    def choose(self, value: T | str, argument: str = "", **given: Any) -> T:
        """The object that a name is short for, or the object itself, with flat options.

        Options that are None count as not given.

        Raises:
            InputError: unknown name or option, a bad value, or an object together with options.
        """
        argument = argument or self.kind
        given = {name: option for name, option in given.items() if option is not None}
        if isinstance(value, str):
            if value not in self._entries:
                raise InputError(
                    f"{argument}={value!r} is unknown; choose one of {', '.join(self)}"
                    + _meant(value, self)
                )
            return self[value].with_options(f"{argument}={value!r}", given)
        if not isinstance(value, self.base):
            if (held := self._coerce(value)) is not None:
                return held.with_options(f"{argument}={value!r}", given)
            named = f"one of the names {', '.join(self)}"
            if isinstance(value, type):
                raise InputError(
                    f"{argument} is the class {value.__name__}; pass an object, "
                    f"{value.__name__}(...), or {named}"
                )
            raise InputError(f"{argument}={value!r}; pass a {self.base.__name__} or {named}")
        if given:
            raise InputError(
                f"{argument}={value!r} is an object, which holds its own options; give "
                f"{', '.join(given)} to it, not beside it"
            )
        return value


class Choice(Generic[T, N]):
    """A field that holds another choice; it may be given by name, and reads as the object."""

    def __init__(self, table: Table[T], default: N | T) -> None:
        self.table, self._default = table, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> T: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:  # dataclasses asks for the default
            return self._default
        return instance.__dict__[f"_{self._name}"]

    def __set__(self, instance: object, value: T | N) -> None:
        instance.__dict__[f"_{self._name}"] = self.table.choose(value, self._name)


class Options:
    """Base of every choice; subclasses are made by :func:`options`."""

    # What users may write instead of the object.
    name: ClassVar[str] = ""
    # Flat options that are no fields: each is short for several, which win where they are given.
    shorthands: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if check := field.metadata.get("check"):
                check(field.name, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Raise InputError for options that contradict each other."""

    def __repr__(self) -> str:
        """The class and what differs from its defaults."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if not _same(getattr(self, field.name), _default(type(self), field))
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Flat option -> the fields that lead to it; an outer option hides an inner of its name."""
        own = dataclasses.fields(self)  # type: ignore[arg-type]
        found: dict[str, tuple[str, ...]] = {field.name: (field.name,) for field in own}
        found |= {f.metadata["also"]: (f.name,) for f in own if f.metadata.get("also")}
        for field in own:
            inner = getattr(self, field.name)
            if isinstance(inner, Options):
                for name, path in inner.paths().items():
                    found.setdefault(name, (field.name, *path))
        return found

    def get(self, name: str) -> Any:
        """A flat option's value.

        Raises:
            KeyError: there is none of that name here.
        """
        value: Any = self
        for field in self.paths()[name]:
            value = getattr(value, field)
        return value

    def flat(self) -> dict[str, Any]:
        """Every flat option and its value; a choice is shown by its name."""
        return {
            name: value.name or repr(value) if isinstance(value, Options) else value
            for name in self.paths()
            for value in [self.get(name)]
        }

    def with_options(self, described: str, given: Mapping[str, Any]) -> Self:
        """A copy with flat options, each put where it belongs.

        Choices first, outermost first, for they decide which other options there are.

        Args:
            described: what this is, for messages.

        Raises:
            InputError: an option that is not here, or that belongs into an object that was given.
        """
        made, rest, sealed = self, dict(given), {}
        for name in [name for name in rest if name in self.shorthands]:
            made = self.shorthands[name](made, rest.pop(name))
        while True:
            paths = made.paths()
            choices = [k for k in rest if k in paths and made._is_choice(paths[k])]
            if not choices:
                break
            first = min(choices, key=lambda name: len(paths[name]))
            path, value = paths[first], rest.pop(first)
            made = made._replaced(path[:-1], {path[-1]: value})
            if isinstance(value, Options):
                sealed[path] = first
        by_owner: dict[tuple[str, ...], dict[str, Any]] = {}
        for name, value in rest.items():
            if name not in paths:
                raise InputError(self._unknown(described, name, made))
            path = paths[name]
            for outer, argument in sealed.items():
                if path[: len(outer)] == outer:
                    raise InputError(
                        f"{argument}={given[argument]!r} is an object, which holds its own "
                        f"options; give {name} to it, not beside it"
                    )
            owner = by_owner.setdefault(path[:-1], {})
            if path[-1] in owner:
                raise InputError(f"{name} and its other name {path[-1]} are both given; pass one")
            owner[path[-1]] = value
        for path in sorted(by_owner, key=len, reverse=True):
            made = made._replaced(path, by_owner[path])
        return made

    def _is_choice(self, path: tuple[str, ...]) -> bool:
        owner: Any = self
        for field in path[:-1]:
            owner = getattr(owner, field)
        return isinstance(_descriptor(type(owner), path[-1]), Choice)

    def _replaced(self, path: tuple[str, ...], changes: Mapping[str, Any]) -> Self:
        if path:
            inner = getattr(self, path[0])._replaced(path[1:], changes)
            changes = {path[0]: inner}
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @staticmethod
    def _unknown(described: str, name: str, made: Options) -> str:
        known = [*made.paths(), *made.shorthands]
        elsewhere = sorted(
            f"{field}={other!r}"
            for field, choice in _choices(made)
            for other in choice.table
            if name in choice.table[other].paths()
        )
        hint = _meant(name, known) or (f"; {' or '.join(elsewhere)} would" if elsewhere else "")
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        return f"{described} has no option {name}; {has}{hint}"


def _descriptor(cls: type, name: str) -> Any:
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _choices(made: Options) -> Iterator[tuple[str, Choice[Any, Any]]]:
    """Every field of a choice that holds another, at any depth."""
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        choice = _descriptor(type(made), field.name)
        if isinstance(choice, Choice):
            yield field.name, choice
        inner = getattr(made, field.name)
        if isinstance(inner, Options):
            yield from _choices(inner)


def _default(cls: type, field: dataclasses.Field[Any]) -> Any:
    choice = _descriptor(cls, field.name)
    if isinstance(choice, Choice):
        return choice.table.choose(choice._default)
    return field.default


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (Options, str, int, float)) and a == b)


def _meant(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def options(cls: type[T]) -> type[T]:
    """Make a class a choice: a frozen dataclass whose fields are given by keyword."""
    return dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
