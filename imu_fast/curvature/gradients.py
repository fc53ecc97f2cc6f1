"""Gradients of single samples, for what has no closed form in their factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.ops.mean_gradient import mean_gradient

# Elements of the per-sample gradients [k, C, D] that exist at once: 128 MB in float64.
_ELEMENTS = 1 << 24


def gradients(chunk: GradientFactors) -> Tensor:
    """Per-sample gradients [n, C, D]."""
    if not chunk.is_flat:
        # A sample's own gradient: the mean over a set of one.
        return torch.stack([_gradient(chunk.samples(i, i + 1)) for i in range(chunk.n)])
    out = chunk.delta.new_empty(chunk.n, chunk.num_classes, chunk.width)
    d = chunk.feature_dim
    torch.mul(chunk.delta[:, :, None], chunk.act[:, None, :], out=out[..., :d])
    if chunk.has_bias:
        out[..., d] = chunk.delta
    return out


def _gradient(one: GradientFactors) -> Tensor:
    return mean_gradient(one.delta, one.act, one.offsets, one.has_bias)


def gradient_slabs(
    chunk: GradientFactors, elements: int = _ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients ``(samples, [k, C, D])``, about so many elements at a time."""
    step = max(1, elements // (chunk.num_classes * chunk.width))
    for start in range(0, chunk.n, step):
        stop = min(start + step, chunk.n)
        yield slice(start, stop), gradients(chunk.samples(start, stop))
