"""What processes that share samples have to have alike, or cannot share."""

from __future__ import annotations

from torch import Tensor

from imu_fast import distributed
from imu_fast.errors import InputError
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.factors.source import Factors


def check_whole(argument: str, factors: Factors) -> None:
    """Raise InputError where they are shared among processes."""
    if isinstance(factors, ShardedFactors):
        raise InputError(
            f"{argument} are shared among processes ({factors.n_here} of {factors.n} samples are "
            "here); pass all of them to every process: factors.gathered()"
        )


def the_same(argument: str, v: Tensor, factors: Factors) -> Tensor:
    """v; where the factors are shared among processes, the first one's bits in all of them.

    Raises:
        InputError: processes have different v.
    """
    if not isinstance(factors, ShardedFactors):
        return v
    if not distributed.alike(v, factors.group):
        raise InputError(
            f"{argument} differs among the processes that share the samples; pass the same to all"
        )
    return distributed.from_first(v.clone(), factors.group)
