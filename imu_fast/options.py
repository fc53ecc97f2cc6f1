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

from imu_fast.errors import InputError, plain_number

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
            named = f"one of the names {', '.join(self)}"
            if isinstance(value, type) and issubclass(value, Options):
                raise InputError(
                    f"{argument} is the class {value.__name__}; pass an object, "
                    f"{value.__name__}(...), or {named}"
                )
            if (held := self._coerce(value)) is not None:
                return held.with_options(f"{argument}={value!r}", given)
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

    # Of the dataclass, which dataclasses.fields would pick out anew each time.
    _fields: ClassVar[tuple[dataclasses.Field[Any], ...]] = ()
    # What users may write instead of the object.
    name: ClassVar[str] = ""
    # Flat options that are no fields: each is short for several, which win where they are given.
    shorthands: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {}

    def __post_init__(self) -> None:
        for field in self._fields:
            if check := field.metadata.get("check"):
                given = getattr(self, field.name)
                value = plain_number(given)  # which can be compared, and written to a file
                if value is not given:
                    object.__setattr__(self, field.name, value)
                check(field.name, value)
        self.check()

    def check(self) -> None:
        """Raise InputError for options that contradict each other."""

    def __repr__(self) -> str:
        """The class and what differs from its defaults."""
        shown = []
        for field in self._fields:
            value, default = getattr(self, field.name), _default(type(self), field)
            if type(value) is not type(default) or not _equal(value, default):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _values(self) -> list[Any]:
        return [getattr(self, f.name) for f in self._fields]

    def __eq__(self, other: object) -> bool:
        """The same class with equal options; tensors and arrays are equal to themselves alone."""
        if type(other) is not type(self):
            return NotImplemented
        return all(map(_equal, self._values(), other._values()))

    def __hash__(self) -> int:
        """Over the options that have a hash; a list of layers has none."""
        return hash((type(self), *(v for v in self._values() if _hashable(v))))

    def _ways(self) -> dict[str, list[tuple[str, ...]]]:
        """Flat option -> every way to it; an outer option hides an inner of its name."""
        own = self._fields
        found: dict[str, list[tuple[str, ...]]] = {field.name: [(field.name,)] for field in own}
        found |= {f.metadata["also"]: [(f.name,)] for f in own if f.metadata.get("also")}
        deeper: dict[str, list[tuple[str, ...]]] = {}
        for field in own:
            inner = getattr(self, field.name)
            if isinstance(inner, Options):
                for name, ways in inner._ways().items():
                    deeper.setdefault(name, []).extend((field.name, *way) for way in ways)
        return found | {name: ways for name, ways in deeper.items() if name not in found}

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Flat option -> the fields that lead to it; an outer option hides an inner of its name."""
        return {name: ways[0] for name, ways in self._ways().items()}

    def get(self, name: str) -> Any:
        """A flat option's value.

        Raises:
            KeyError: there is none of that name here.
        """
        return self._at(self.paths()[name])

    def _at(self, path: tuple[str, ...]) -> Any:
        value: Any = self
        for field in path:
            value = getattr(value, field)
        return value

    def flat(self) -> dict[str, Any]:
        """Every option and its value, under one name; a choice is shown by its name.

        Given to :meth:`with_options` they make the same object.
        """
        found: dict[tuple[str, ...], tuple[str, Any]] = {}
        for name, path in self.paths().items():
            value = self._at(path)
            shown = value.name or repr(value) if isinstance(value, Options) else value
            found.setdefault(path, (name, shown))
        return dict(found.values())

    def with_options(self, described: str, given: Mapping[str, Any]) -> Self:
        """A copy with flat options, each put where it belongs.

        Choices first, outermost first, for they decide which other options there are.

        Args:
            described: what this is, for messages.

        Raises:
            InputError: an option that is not here, or that belongs into an object that was given.
        """
        made = self
        sealed: dict[tuple[str, ...], str] = {}
        rest = {name: value for name, value in given.items() if value is not None}
        if not rest:
            return self
        for name in [name for name in rest if name in self.shorthands]:
            made = self.shorthands[name](made, rest.pop(name))
        while True:
            ways = made._ways()
            choices = [k for k in rest if k in ways and made._is_choice(ways[k][0])]
            if not choices:
                break
            first = min(choices, key=lambda name: len(ways[name][0]))
            path, value = _only_way(first, ways[first], sealed), rest.pop(first)
            made = made._replaced(path[:-1], {path[-1]: value})
            if isinstance(value, Options):
                sealed[path] = f"{first}={value!r}"
        named: dict[tuple[str, ...], str] = {}
        for name, value in rest.items():
            if name not in ways:
                raise InputError(self._unknown(described, name, made))
            path = _only_way(name, ways[name], sealed)
            if path in named:
                raise InputError(
                    f"{named[path]} and {name} are two names of one option; pass one of them"
                )
            named[path] = name
            made = made._replaced(path[:-1], {path[-1]: value})
        made._check_all()
        return made

    def _is_choice(self, path: tuple[str, ...]) -> bool:
        owner: Any = self
        for field in path[:-1]:
            owner = getattr(owner, field)
        return isinstance(_descriptor(type(owner), path[-1]), Choice)

    def _replaced(self, path: tuple[str, ...], changes: Mapping[str, Any]) -> Self:
        """A copy whose checks are still to come: what contradicts now may be replaced next."""
        if path:
            changes = {path[0]: getattr(self, path[0])._replaced(path[1:], changes)}
        made = object.__new__(type(self))
        for field in self._fields:
            value = changes[field.name] if field.name in changes else getattr(self, field.name)
            object.__setattr__(made, field.name, value)
        return made

    def _check_all(self) -> None:
        for value in self._values():
            if isinstance(value, Options):
                value._check_all()
        self.__post_init__()

    @staticmethod
    def _unknown(described: str, name: str, made: Options) -> str:
        known = [*made.paths(), *made.shorthands]
        elsewhere = sorted(
            f"{field}={other!r}"
            for field, choice in _choices(made)
            for other in choice.table
            if name in choice.table[other].paths()
        )
        hint = f"; {' or '.join(elsewhere)} would" if elsewhere else _meant(name, known)
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        return f"{described} has no option {name}; {has}{hint}"


def _only_way(
    name: str, ways: list[tuple[str, ...]], sealed: Mapping[tuple[str, ...], str]
) -> tuple[str, ...]:
    """The way to a flat option, unless it is one of several, or into a given object.

    Args:
        sealed: where objects were given -> as what.
    """
    path, *others = ways
    for outer, written in sealed.items():
        if path[: len(outer)] == outer:
            raise InputError(
                f"{written} is an object, which holds its own options; give {name} to it, "
                "not beside it"
            )
    if others:
        owners = " and to ".join(".".join(way[:-1]) for way in ways)
        raise InputError(f"{name} belongs to {owners}; give it to the object that is meant")
    return path


def _descriptor(cls: type, name: str) -> Any:
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _choices(made: Options) -> Iterator[tuple[str, Choice[Any, Any]]]:
    """Every field of a choice that holds another, at any depth."""
    for field in made._fields:
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


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        same = a == b
    except Exception:  # tensors within a list
        return False
    # What tensors and arrays answer is no bool, nor is numpy's of two numbers.
    plain = isinstance(a, (int, float, str)) and isinstance(b, (int, float, str))
    return bool(same) if plain else same is True


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _meant(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def options(cls: type[T]) -> type[T]:
    """Make a class a choice: a frozen dataclass whose fields are given by keyword.

    Raises:
        TypeError: two of its options have one name.
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)(cls)
    made._fields = fields = dataclasses.fields(made)  # type: ignore[arg-type]
    also = [f.metadata["also"] for f in fields if f.metadata.get("also")]
    names = [*(f.name for f in fields), *also]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"{made.__name__} has two options of the name {', '.join(twice)}")
    return made
