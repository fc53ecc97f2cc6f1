"""Calls that read sums over samples which are shared among processes: made by all, or by none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

from imu_fast import distributed
from imu_fast.errors import InputError
from imu_fast.factors.protocol import is_shared

P = ParamSpec("P")
R = TypeVar("R")


def _shared_in(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _shared_in(value)
        elif is_shared(value) or hasattr(type(value), "over_classes"):
            yield value  # samples, or a head's classes
        elif (reads := getattr(value, "reads", None)) is not None and is_shared(reads):
            yield reads  # a fitted curvature that goes on reading its samples


def joined(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> AbstractContextManager[None] | None:
    """Makes a call of shared factors, or of a group, one of all or of none; None: of neither.

    Raises:
        InputError: the group is none; in the context: what is shared is so by other processes.
    """
    every = list(_shared_in((*args, *kwargs.values())))
    group = kwargs.get("group")
    if group is not None:
        distributed.check_group(group)
    elif every:
        group = every[0].group
    else:
        return None
    return _joined(f"{function.__qualname__}()", group, every)


@contextmanager
def _joined(call: str, group: distributed.Group, every: Sequence[Any]) -> Iterator[None]:
    """The call by all processes of a group, of which everything that is shared has to be."""
    with distributed.together(call, group):
        for shared in every:
            if not distributed.same_processes(shared.group, group):
                raise InputError(
                    f"{call}: what it is given is shared among different processes, whose sums are "
                    "over other samples; pass what one group shares, or gathered() of the other"
                )
        yield


def joint(function: Callable[P, R]) -> Callable[P, R]:
    """For functions of shared factors: an error in one process is that of all."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        step = joined(function, args, kwargs)
        if step is None:
            return function(*args, **kwargs)
        with step:
            return function(*args, **kwargs)

    return wrapped


def said(source: Any, what: Callable[[], str]) -> None:
    """Where samples are shared, raise InputError unless all processes say the same.

    Args:
        source: factors, or several. what: asked where they are shared.
    """
    for shared in _shared_in([source]):
        distributed.in_step(what(), shared.group)
        return
