"""Gradients of single samples, for what has no closed form in their factors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.ops.tokens import equal_length, sum_over_tokens

# Elements of the per-sample gradients [k, C, D] that exist at once: 128 MB in float64.
_ELEMENTS = 1 << 24


def gradients(chunk: GradientFactors, out: Tensor | None = None) -> Tensor:
    """Per-sample gradients [n, C, D].

    Args:
        out: where they go; new memory without.
    """
    n, d = chunk.n, chunk.feature_dim
    if out is None:
        out = chunk.delta.new_empty(n, chunk.num_classes, chunk.width)
    length = equal_length(chunk.offsets)
    if length == 1:
        torch.mul(chunk.delta[:, :, None], chunk.act[:, None, :], out=out[..., :d])
    elif length:
        act = chunk.act.to(chunk.dtype)  # of few samples, whose gradients are all here
        signal, inputs = (x.unflatten(0, (n, length)) for x in (chunk.delta, act))
        torch.bmm(signal.transpose(1, 2), inputs, out=out[..., :d])
    else:
        for one, (first, last) in zip(out, pairwise(chunk.offsets.tolist()), strict=True):
            act = chunk.act[first:last].to(chunk.dtype)
            torch.mm(chunk.delta[first:last].t(), act, out=one[:, :d])
    if chunk.has_bias:
        out[..., d] = sum_over_tokens(chunk.delta, chunk.offsets)
    return out


def gradient_slabs(
    chunk: GradientFactors, elements: int = _ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients ``(samples, [k, C, D])``, about so many elements at a time."""
    step = max(1, elements // (chunk.num_classes * chunk.width))
    for start in range(0, chunk.n, step):
        stop = min(start + step, chunk.n)
        yield slice(start, stop), gradients(chunk.samples(start, stop))
