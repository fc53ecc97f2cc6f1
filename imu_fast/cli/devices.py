"""Where a command runs."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from imu_fast.cli.processes import count, local_rank
from imu_fast.errors import InputError, brief

DeviceName = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, ...; default: a CUDA GPU where there is one, else cpu. Under "
        "torchrun cuda is one for each process."
    ),
]


def device_named(name: str | None) -> torch.device:
    """The device of ``--device``; without a name a CUDA GPU where there is one, else the CPU.

    Under torchrun ``cuda`` is a GPU of its own for each process of a machine.

    Raises:
        InputError: there is no such device here, it holds no numbers (``meta``), or several
            processes would share one GPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if count() == 1:
            return torch.device(name)
    if count() > 1 and name == "cuda":
        name = f"cuda:{local_rank()}"
    elif count() > 1 and name.startswith("cuda:"):
        raise InputError(
            f"device={name!r} would be that of {count()} processes; pass --device cuda, of which "
            "each takes its own"
        )
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    # What torch raises: unknown, not compiled in (both kinds), no driver, no numbers.
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        here = ["cpu", *(f"cuda:{place}" for place in range(torch.cuda.device_count()))]
        raise InputError(
            f"device={name!r} is not to be had ({brief(error, 100)}); here there is "
            f"{', '.join(here)}"
        ) from error
    return device
