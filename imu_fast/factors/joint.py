"""Calls that read sums over samples which are shared among processes: made by all, or by none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from imu_fast import distributed
from imu_fast.factors.protocol import is_shared

P = ParamSpec("P")
R = TypeVar("R")


def _shared_in(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _shared_in(value)
        elif is_shared(value):
            yield value
        elif (reads := getattr(value, "reads", None)) is not None and is_shared(reads):
            yield reads  # a fitted curvature that goes on reading its samples


def joint(function: Callable[P, R]) -> Callable[P, R]:
    """For functions of factors: where these are shared, an error in one process is that of all."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        shared = next(_shared_in((*args, *kwargs.values())), None)
        if shared is None:
            return function(*args, **kwargs)
        with distributed.together(f"{function.__qualname__}()", shared.group):
            return function(*args, **kwargs)

    return wrapped


def said(source: Any, what: str) -> None:
    """Where samples are shared, raise InputError unless all processes say the same.

    Args:
        source: factors, or several.
    """
    for shared in _shared_in([source]):
        distributed.in_step(what, shared.group)
        return
