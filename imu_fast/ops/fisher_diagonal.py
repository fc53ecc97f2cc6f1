"""The empirical Fisher's diagonal from gradient factors, never storing a per-sample gradient."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation
from imu_fast.ops.squared_products import add_squared_products, extension
from imu_fast.ops.tokens import equal_length, groups_of_equal_length, is_flat, widened

# Squares live only for one chunk: large enough for a full-speed GEMM, small enough to stay in a
# last-level cache and out of the memory budget (a few MB in float32 at C = 1,000, d = 2,048).
CHUNK_TOKENS = 1024
# Elements of the [samples, classes, D] tile of per-sample gradients for ragged tokens.
TILE_ELEMENTS = 1 << 22
# From this many entries on, a sample's gradient is worth a matrix product of its own, on views;
# smaller ones are batched by length, which copies their tokens.
_ALONE = 1 << 14


def gradient_tiles(
    delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool
) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """Tiles ``(samples [g], class slab, g_i[slab] as [g, slab, D])`` of ragged samples.

    Samples are grouped by length, so each tile is one batched matrix product without padding.
    """
    width = act.shape[1] + has_bias
    classes = min(delta.shape[1], max(1, TILE_ELEMENTS // width))
    per_tile = max(1, TILE_ELEMENTS // (classes * width))
    length = equal_length(offsets)
    if length and not has_bias:  # samples as they lie, without a copy
        signal, inputs = delta.unflatten(0, (-1, length)), act.unflatten(0, (-1, length))
        every = torch.arange(len(signal), device=delta.device)
        for first in range(0, len(signal), per_tile):
            some = slice(first, first + per_tile)
            chunk = every[some]
            for start in range(0, delta.shape[1], classes):
                slab = slice(start, start + classes)
                some_inputs = inputs[some].to(delta.dtype)
                yield chunk, slab, signal[some, :, slab].transpose(1, 2) @ some_inputs
        return
    for samples, tokens in groups_of_equal_length(offsets, delta.device):
        for chunk, rows in zip(samples.split(per_tile), tokens.split(per_tile), strict=True):
            a = act[rows].to(delta.dtype)
            if has_bias:
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            for start in range(0, delta.shape[1], classes):
                slab = slice(start, start + classes)
                yield chunk, slab, delta[rows][..., slab].transpose(1, 2) @ a


def _kernel_limits(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> str:
    return kernel_dtypes(delta, act)


def _launch(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool, precision: str) -> Tensor:
    from imu_fast.kernels import fisher_diagonal as kernel

    ragged = None if is_flat(offsets) else offsets
    return kernel.fisher_diagonal(delta, act, ragged, has_bias, precision).to(delta.dtype)


@operation(kernel=_launch, limits=_kernel_limits, products=PRODUCTS)
def fisher_diagonal(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``diag(1/n sum_i g_i g_i^T)``.

    One token per sample: ``(delta*delta).T @ (a~*a~) / n``. Several: the square of the sum over a
    sample's tokens, tile by tile.

    Args:
        delta: [N, C]. act: [N, d], delta's dtype or a narrower one. offsets: [n+1].
        has_bias: whether a~ has a trailing 1.

    Returns:
        [C, D] in delta's dtype.
    """
    n = offsets.shape[0] - 1
    shape = (delta.shape[1], act.shape[1] + has_bias)
    if is_flat(offsets):
        total = delta.new_empty(shape)
        for start in range(0, n, CHUNK_TOKENS):
            d2 = delta[start : start + CHUNK_TOKENS].square()
            a2 = act[start : start + CHUNK_TOKENS].to(delta.dtype).square()
            add_gradients(total, d2, a2, has_bias, beta=float(start > 0), alpha=1 / n)
        return total
    total = delta.new_zeros(shape)
    if total.numel() >= _ALONE or extension(total) is not None:
        d = act.shape[1]
        if has_bias:
            for first, last in pairwise(offsets.tolist()):
                total[:, d] += delta[first:last].sum(dim=0).square_()
        for signal, inputs, ends in widened(delta, act, offsets):
            add_squared_products(total[:, :d], signal, inputs, offsets=ends)
        return total.div_(n)
    for _, slab, g in gradient_tiles(delta, act, offsets, has_bias):
        total[slab] += g.square_().sum(dim=0)
    return total.div_(n)
