"""Squares of gradients where those of their factors would underflow.

Signal and input are squared each by itself, so that a signal of 1e-24 at an input of 1e18, whose
product is a number like others, would be lost in float32. Such samples are squared in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.tokens import WIDENED_TOKENS


def has_squares(chunk: Any, floor: float) -> bool:
    """Whether squares of delta and act that underflow are nothing beside ``floor``."""
    if chunk.dtype == torch.float64 or not chunk.num_tokens:
        return True
    known = torch.finfo(chunk.dtype)
    # At least the largest entry, twenty times as fast as that.
    sizes = [norm(x, chunk.dtype) for x in (chunk.delta, chunk.act)]
    largest = max(*sizes, float(chunk.has_bias))
    return largest * largest * known.tiny <= known.eps * floor


def norm(x: Tensor, dtype: torch.dtype) -> float:
    """Of all entries, summed in ``dtype``, which x may be narrower than."""
    if x.dtype == dtype:
        return float(torch.linalg.vector_norm(x))
    rows = (torch.linalg.vector_norm(part, dtype=dtype) for part in x.split(WIDENED_TOKENS))
    return math.hypot(*map(float, rows))


def in_float64(operation: Callable[..., Tensor], chunk: Any, *x: Tensor) -> Tensor:
    """Of the same samples, in the chunk's dtype."""
    wide = chunk.delta.double(), chunk.act.double(), *x, chunk.offsets, chunk.has_bias
    return operation(*wide).to(chunk.dtype)


def diagonal_of(chunk: Any, floor: float | None = None, of_mean: float = 1.0) -> Tensor:
    """``1/n sum_i g_i * g_i`` of a chunk of factors: [C, D].

    Args:
        floor: beside which nothing may be lost; None: so many times the mean of the diagonal.
    """
    found = fisher_diagonal(chunk.delta, chunk.act, chunk.offsets, chunk.has_bias)
    floor = of_mean * float(found.mean()) if floor is None else floor
    return found if has_squares(chunk, floor) else in_float64(fisher_diagonal, chunk)
