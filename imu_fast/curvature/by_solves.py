"""Quantities of single samples under a curvature that has no closed form for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from imu_fast.factors import GradientFactors

# Elements of the per-sample gradients [k, C, D] that exist at once: 128 MB in float64.
_ELEMENTS = 1 << 24


def gradient_slabs(factors: GradientFactors) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients ``(samples, [k, C, D])``, a few at a time."""
    step = max(1, _ELEMENTS // (factors.num_classes * factors.width))
    for start in range(0, factors.n, step):
        samples = range(start, min(start + step, factors.n))
        # A sample's own gradient: the mean over a set of one.
        rows = [factors.select(torch.tensor([i])).mean_gradient() for i in samples]
        yield slice(samples.start, samples.stop), torch.stack(rows)


def self_influence(fitted: Any, factors: GradientFactors) -> tuple[Tensor, float]:
    """``g_i^T M^-1 g_i`` [n] by one solve per sample, and the largest residual of them."""
    out, worst = factors.delta.new_empty(factors.n), 0.0
    for samples, g in gradient_slabs(factors):
        out[samples] = (fitted.solve(g) * g).sum(dim=(1, 2)).to(out)
        worst = max(worst, fitted.residual)
    return out, worst
