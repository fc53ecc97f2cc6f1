"""Commands under torchrun: each process reads a part of the samples, the first one writes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from imu_fast.errors import InputError


def count() -> int:
    """Processes that torchrun has started; 1 without it."""
    started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if started else 1


def local_rank() -> int:
    """Of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class Processes:
    """This process among those of a command.

    Attributes:
        group: theirs; None: there is one alone.
    """

    group: Any = None
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def share(self, loader: Any) -> Any:
        """The consecutive part of a loader's samples that this process reads."""
        if self.group is None:
            return loader
        from torch.utils.data import DataLoader, Subset

        n = len(loader.dataset)
        mine = range(n * self.rank // self.world, n * (self.rank + 1) // self.world)
        if not mine:
            return []
        return DataLoader(
            Subset(loader.dataset, mine), loader.batch_size, collate_fn=loader.collate_fn
        )

    def wait(self, what: str) -> None:
        """Until all are here."""
        if self.group is not None:
            from imu_fast.distributed import in_step

            in_step(what, self.group)

    def whole(self, column: Any) -> Any:
        """The column [n] of all samples, of each process's own part."""
        if self.group is None:
            return column
        from imu_fast.distributed import rows_of_all

        return rows_of_all(column, self.group)


@contextlib.contextmanager
def joined(device: Any, command: str) -> Iterator[Processes]:
    """The processes of a command, in step; all but the first are silent.

    Args:
        device: where this one works.
    """
    if count() == 1:
        yield Processes()
        return
    import torch
    import torch.distributed as dist

    from imu_fast.distributed import together

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        group = dist.group.WORLD
        here = Processes(group, dist.get_rank(), dist.get_world_size())
        with contextlib.ExitStack() as stack:
            if not here.first:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(together(command, group))
            yield here
    finally:
        dist.destroy_process_group()


def alone(what: str) -> None:
    """Raise InputError under torchrun."""
    if count() > 1:
        raise InputError(f"{what} runs in one process, and torchrun has started {count()}")


def speaks(error: Exception) -> bool:
    """Whether this process is to print an error: one that all have is the first one's to say."""
    distributed = sys.modules.get("imu_fast.distributed")
    if count() == 1 or distributed is None or os.environ.get("RANK") == "0":
        return True
    return not distributed.is_told(error)
