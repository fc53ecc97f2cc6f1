"""Operands and results, whatever tuples they are in: copied, made exact, moved, and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imu_fast.check.entries import Entry, Operands, Shape


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed; tuples keep their type."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, tuple) else []


def copied(value: Any) -> Any:
    return mapped(value, Tensor.clone)


def exact(value: Any) -> Any:
    """Copies whose numbers are in float64."""
    return mapped(value, lambda x: x.double() if x.is_floating_point() else x.clone())


def operands(
    entry: Entry, shape: Shape, dtype: torch.dtype, name: str, device: torch.device
) -> Operands:
    """On a device; offsets stay on the CPU, where operations read them."""
    offsets = shape.offsets

    def moved(x: Tensor) -> Tensor:
        return x if x.dtype == torch.int64 and x.shape == offsets.shape else x.to(device)

    found: Operands = mapped(entry.make(shape, dtype, name), moved)
    return found


def results(entry: Entry, function: Callable[..., Any], given: Operands) -> list[Tensor]:
    """What a call returns, then what it changed."""
    found = function(*given, **entry.options)
    return [*tensors(found), *tensors(tuple(given[i] for i in entry.changed))]
