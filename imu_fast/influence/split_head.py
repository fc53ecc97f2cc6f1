"""Scores of a head whose classes are shared among processes: sums over each one's classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imu_fast.distributed import same_processes
from imu_fast.errors import InputError
from imu_fast.factors.sharded_head import ShardedHead
from imu_fast.influence.default import MAX_ORDER


def own_part(name: str, value: Any, head: ShardedHead) -> Any:
    """What of a target or of queries is this process's: of a tensor, its own rows, it is all.

    Raises:
        InputError: they are of another kind, or shared otherwise.
    """
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, ShardedHead):
        raise InputError(
            f"{name} is a {type(value).__name__}, and source is a ShardedHead, of which each "
            "process has some classes; make one of these samples too"
        )
    if value.classes != head.classes or not same_processes(value.group, head.group):
        raise InputError(
            f"{name} has classes {value.classes.start}:{value.classes.stop} in this process, "
            f"source {head.classes.start}:{head.classes.stop}; make both of the same rows"
        )
    return value.own


def check_default(head: ShardedHead, curvature: Any) -> None:
    """Raise InputError where the default of attribution couples outputs."""
    if curvature is None and max(head.num_classes, head.width) <= MAX_ORDER:
        raise InputError(
            f"curvature=None is EKFAC for a head of {head.num_classes} classes, which couples "
            "those that processes share; name one that does not: 'fisher_diag' or 'identity'"
        )


def refuse(name: str, values: list[Any]) -> None:
    """Raise InputError for a head in parts, where only whole factors are taken."""
    if any(isinstance(value, ShardedHead) for value in values):
        raise InputError(
            f"{name} holds a ShardedHead, whose classes are shared among processes; "
            "influence_scores, self_influence and pairwise_influence take it, alone: pass it to "
            "these, or factors of the whole head here"
        )
