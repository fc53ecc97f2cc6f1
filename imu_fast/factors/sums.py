"""Parts of a result put together, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", Tensor, tuple[Tensor, ...])


def summed(parts: Iterable[S]) -> S:
    """The sum, in this order, in the memory of the first."""
    total: Any = None
    for part in parts:
        if total is None:
            total = part
            continue
        pairs = [(total, part)] if isinstance(part, Tensor) else zip(total, part, strict=True)
        for one, more in pairs:
            one.add_(more)
    return total


def joined(parts: Iterable[Tensor]) -> Tensor:
    """All rows; of a single part itself."""
    first, *rest = parts
    return torch.cat([first, *rest]) if rest else first
