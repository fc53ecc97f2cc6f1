"""What curvatures and scores ask of gradient factors, wherever and however these are kept.

Every statistic but the Gram matrix is a sum over samples, so one verb, ``sums``, serves factors in
memory, read from a file, made anew from a loader at each pass, and shared among processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.protocol import Source, is_shared
from imu_fast.factors.protocol import mean_of as mean_of
from imu_fast.losses.output_curvature import StoredCurvature

# Bytes that factors which are kept elsewhere may take where they are needed all at once.
MAX_GATHERED = 1 << 32
T = TypeVar("T", covariant=True)


Factors = Source[GradientFactors]
"""Gradient factors in whatever form."""


def is_factors(value: Any) -> bool:
    """Whether this is one layer's factors, in whatever form."""
    return all(callable(getattr(type(value), name, None)) for name in ("chunks", "sums", "each"))


class Remembered(Generic[T]):
    """What is made of a chunk, remembered for the last one: in memory there is no other."""

    def __init__(self, make: Callable[[GradientFactors], T]) -> None:
        self._make = make
        self._last: tuple[GradientFactors, T] | None = None

    def __call__(self, chunk: GradientFactors) -> T:
        if self._last is None or self._last[0] is not chunk:
            self._last = None  # two at once would need the memory of two
            self._last = chunk, self._make(chunk)
        return self._last[1]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _curvature(parts: list[Any]) -> StoredCurvature | None:
    there = [part for part in parts if isinstance(part, StoredCurvature)]
    return type(there[0]).joined(there) if len(there) == len(parts) else None


def bytes_of(source: Factors, signals: int = 0) -> int:
    """In bytes, of all samples."""
    each = source.num_classes * (1 + signals) + source.feature_dim
    return source.num_tokens * each * source.dtype.itemsize


def may_be_in_memory(source: Factors, signals: int = 0) -> bool:
    """Whether they are, or take at most MAX_GATHERED bytes; with so many signals of each row."""
    return isinstance(source, GradientFactors) or bytes_of(source, signals) <= MAX_GATHERED


def in_memory(source: Factors, what: str) -> GradientFactors:
    """All samples as one, for what is no sum over them; of shared ones, in every process.

    Args:
        what: needs that, for the message.

    Raises:
        InputError: they are beyond MAX_GATHERED bytes.
    """
    if isinstance(source, GradientFactors):
        return source
    if not may_be_in_memory(source):
        raise InputError(
            f"{what} needs all factors in memory, which are {bytes_of(source) / 1e9:.1f} GB; use "
            "fewer samples, or 'fisher_diag', 'kfac', or 'ggn' with solver='cg'"
        )
    if is_shared(source):
        gathered: GradientFactors = source.gathered()  # type: ignore[attr-defined]
        return gathered
    chunks = list(source.chunks())
    counts = torch.cat([chunk.offsets.diff() for chunk in chunks])
    return GradientFactors(
        torch.cat([chunk.delta for chunk in chunks]),
        torch.cat([chunk.act for chunk in chunks]),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        source.has_bias,
        _joined([chunk.labels for chunk in chunks]),
        _joined([chunk.losses for chunk in chunks]),
        source.name,
        chunks[0].loss,
        _curvature([chunk.curvature for chunk in chunks]),
    )
