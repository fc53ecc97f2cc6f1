"""Sums over the processes of torch.distributed.

Nothing here looks for a process group by itself: a group that happens to exist belongs to the
user's own training. Only factors that say that they are shared among processes call this.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from imu_fast.errors import InputError

T = TypeVar("T")
Group = Any
"""A ``torch.distributed.ProcessGroup``, or None for all processes."""


def check_group(group: Group) -> None:
    """Raise InputError unless there are processes to sum over."""
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "there is no process group to share factors among; start with torchrun and call "
            "torch.distributed.init_process_group() first, or use the factors as they are"
        )
    if dist.get_rank(group) < 0:
        raise InputError("this process does not belong to the group that it was given")


def sum_(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over all processes, in place; every process gets the same bits.

    Each of them has to call this, in the same order.
    """
    whole = tensor.contiguous()
    dist.all_reduce(whole, group=group)
    return tensor if whole is tensor else tensor.copy_(whole)


def gather(value: T, group: Group = None) -> list[T]:
    """What each process passed, in the order of their ranks; for small Python values."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
