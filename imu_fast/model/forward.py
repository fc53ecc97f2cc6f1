"""What a model's forward takes: how many inputs, and under which names."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import typing_extensions
from torch import nn

# Under these names labels come in batches and into models, the commonest first.
LABEL_NAMES = ("labels", "label", "label_ids", "target", "targets", "y")


def innermost(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel and torch.compile."""
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def wrapped(model: nn.Module) -> nn.Module | None:
    """The module that one of these wraps; None: it is none of them."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    return inner if isinstance(inner, nn.Module) else None


def inside(model: nn.Module, named: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The module inside of wrappers, and what is named in the wrapper by its names in that."""
    inner = innermost(model)
    where = next(name for name, module in model.named_modules() if module is inner)
    return inner, {name.removeprefix(f"{where}."): value for name, value in named.items()}


@dataclass(frozen=True)
class Forward:
    """The inputs of a forward.

    Attributes:
        positional: names of what may be given by position, in order.
        required: names of what must be given, by position or keyword.
        names: of everything that may be given by keyword.
        any_position, any_keyword: whether it takes ``*args``, ``**kwargs``.
    """

    positional: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    any_position: bool = True
    any_keyword: bool = True

    @property
    def fewest(self) -> int:
        """Inputs that must be given by position, labels among them where they are required."""
        return sum(name in self.required for name in self.positional)

    @property
    def most(self) -> float:
        """Inputs that may be given by position before labels are, infinity for ``*args``."""
        if self.any_position:
            return math.inf
        for place, name in enumerate(self.positional):
            if name in LABEL_NAMES and name not in self.required:
                return place
        return len(self.positional)

    @property
    def labels(self) -> str | None:
        """Under which name the forward takes labels; None: it takes none, or says no name."""
        return next((name for name in LABEL_NAMES if name in self.names), None)

    @property
    def place_of_labels(self) -> int:
        """As which positional input the forward takes labels; beyond any: as none."""
        found = [i for i, name in enumerate(self.positional) if name == self.labels]
        return found[0] if found else sys.maxsize

    def takes_labels_at(self, place: int) -> bool:
        """Whether the forward must have the labels as its input number ``place``."""
        if place + 1 != self.fewest or place >= len(self.positional):
            return False
        return place > 0 and self.positional[place] in LABEL_NAMES


def forward_of(model: nn.Module) -> Forward:
    """Read a model's signature; one that cannot be read takes anything.

    What a forward takes as ``**kwargs`` it may hand to the one that it overrides, or that it wraps
    (peft): the names of that one are taken too.
    """
    inner = innermost(model)
    found, passes = _read(inner.forward)
    for forward in _further(inner):
        if not passes:
            break
        more, passes = _read(forward)
        found = _joined(found, more)
    # transformers' models hand what they do not know to their layers.
    return replace(found, any_keyword=found.any_keyword and not hasattr(inner, "main_input_name"))


def _further(inner: nn.Module) -> Iterator[Callable[..., Any]]:
    """What a module's forward may hand its arguments to, the nearest first."""
    own = "forward" in vars(inner)  # set on the object: the class's is behind it
    for kind in type(inner).__mro__:
        forward = vars(kind).get("forward")
        if kind is nn.Module or forward is None:
            continue
        if own:
            yield forward.__get__(inner, type(inner))
        own = True
    base = getattr(inner, "get_base_model", None)  # of peft
    if callable(base) and isinstance(inside := base(), nn.Module) and inside is not inner:
        yield inside.forward
        yield from _further(inside)


def _joined(found: Forward, more: Forward) -> Forward:
    """Of a forward that hands what it does not name to another."""
    by_place = found.any_position and not found.positional
    return Forward(
        more.positional if by_place else found.positional,
        found.required if found.names or found.positional else more.required,
        found.names | more.names,
        found.any_position and (more.any_position or not by_place),
        found.any_keyword and more.any_keyword,
    )


def _read(forward: Any) -> tuple[Forward, bool]:
    """The inputs of one forward, and whether it takes ``**kwargs`` of whatever type."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (ValueError, TypeError):
        schema = getattr(forward, "schema", None)  # a traced or scripted model
        if schema is None:
            return Forward(), False
        arguments = schema.arguments[1:]
        names = tuple(argument.name for argument in arguments)
        required = frozenset(a.name for a in arguments if not a.has_default_value())
        return Forward(names, required, frozenset(names), False, False), False
    kinds = inspect.Parameter
    others = [p for p in parameters if p.kind == kinds.VAR_KEYWORD]
    # transformers says which names its models take so.
    unpacked = [typing_extensions.get_args(p.annotation) for p in others]
    declared: list[Any] = [
        u[0].__annotations__ for u in unpacked if u and hasattr(u[0], "__total__")
    ]
    by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    by_keyword = (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    return Forward(
        tuple(p.name for p in parameters if p.kind in by_position),
        frozenset(
            p.name
            for p in parameters
            if p.default is kinds.empty and p.kind in (*by_position, *by_keyword)
        ),
        frozenset(p.name for p in parameters if p.kind in by_keyword).union(*declared),
        any(p.kind == kinds.VAR_POSITIONAL for p in parameters),
        bool(others) and not declared,
    ), bool(others)
