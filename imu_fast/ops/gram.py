"""Inner products of per-sample gradients, ``K = G G^T``, and G never stored whole."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation
from imu_fast.ops.routes import forms_for_products
from imu_fast.ops.tokens import equal_length, is_flat, sum_over_tokens, widened

# Elements of each of the two [rows, N] products that exist at once, and as many as a cache holds
# until they are summed: so many where that leaves rows enough for a product at full speed.
_TILE_ELEMENTS, _CACHED_ELEMENTS, _TILE_ROWS = 1 << 22, 1 << 18, 128
# Where gradients are formed: elements of the right set's that exist at once at most; those of one
# product, of either set, as a cache holds them; and the fewest outputs of a layer among them, as
# products of fewer rows are slow for their size.
_HELD_ELEMENTS, _FORMED_ELEMENTS, _FORMED_ROWS = 1 << 22, 1 << 20, 64
# Samples in a strip of rows of the symmetric K, of which only what is right of it is computed.
_STRIP = 256
# The kernel's grid has one program per pair of ragged samples, and CUDA's limit is 2^31 - 1.
MAX_KERNEL_SAMPLES = 46_340

Operands = tuple[Tensor, Tensor, Tensor]
"""delta [N, C], act [N, d] and offsets [n+1] of one set of samples."""


def _kernel_limits(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> str:
    many = len(offsets) - 1 > MAX_KERNEL_SAMPLES
    return kernel_dtypes(delta, act) or (f"more than {MAX_KERNEL_SAMPLES} samples" if many else "")


def _launch(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool, precision: str) -> Tensor:
    from imu_fast.kernels import gram as kernel

    ragged = None if is_flat(offsets) else offsets
    return kernel.gram(delta, act, ragged, has_bias, precision).to(delta.dtype)


@operation(kernel=_launch, limits=_kernel_limits, products=PRODUCTS)
def gram(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``K[i,j] = sum_{s,t} (delta_is . delta_jt)(a~_is . a~_jt)``.

    The elementwise product of two Gram matrices of tokens, summed over both samples' tokens, in
    tiles of rows; what is left of the diagonal is copied, not computed.

    Args:
        delta: [N, C]. act: [N, d], delta's dtype or a narrower one. offsets: [n+1].
        has_bias: whether a~ has a trailing 1.

    Returns:
        [n, n] in delta's dtype, symmetric to the last bit.
    """
    n = len(offsets) - 1
    k = delta.new_empty(n, n)
    for start in range(0, n, _STRIP):
        stop = min(start + _STRIP, n)
        rows = _samples(delta, act, offsets, start, stop)
        strip = _cross_products(rows, _samples(delta, act, offsets, start, n), has_bias)
        square = strip[:, : stop - start]
        square.copy_(square.triu() + square.triu(1).t())
        k[start:stop, start:] = strip
        k[stop:, start:stop] = strip[:, stop - start :].t()
    return k


def _samples(delta: Tensor, act: Tensor, offsets: Tensor, first: int, last: int) -> Operands:
    """The operands of samples first to last alone, as views."""
    tokens = slice(int(offsets[first]), int(offsets[last]))
    return delta[tokens], act[tokens], offsets[first : last + 1] - offsets[first]


@operation(products=PRODUCTS)
def cross_gram(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    """``<g_i, h_j>`` of the samples of two sets, as :func:`gram` has it of one.

    Args:
        left, right: delta [N, C], act [N, d] (delta's dtype or a narrower one) and offsets [n+1]
            of each.
        has_bias: whether a~ has a trailing 1.

    Returns:
        [n, m] in delta's dtype.
    """
    return _cross_products(left, right, has_bias)


def _cross_products(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    """By the route that :mod:`imu_fast.ops.routes` finds cheaper."""
    if not left[0].dtype == left[1].dtype == right[1].dtype:
        return torch.cat(
            [
                torch.cat([_of_one_dtype(one, other, has_bias) for other in widened(*right)], dim=1)
                for one in widened(*left)
            ]
        )
    return _of_one_dtype(left, right, has_bias)


def _of_one_dtype(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    n, m, classes, width = _sizes(left, right, has_bias)
    passes = math.ceil(m / _held(m, classes, width)[1])
    tokens = len(left[0]), len(right[0])
    if forms_for_products(tokens, (n, m), classes, width, passes):
        return _of_gradients(left, right, has_bias)
    return _of_tokens(left, right, has_bias)


def _sizes(left: Operands, right: Operands, has_bias: bool) -> tuple[int, int, int, int]:
    """n, m, C and D."""
    delta, act, offsets = left
    return len(offsets) - 1, len(right[2]) - 1, delta.shape[1], act.shape[1] + has_bias


def _held(m: int, classes: int, width: int) -> tuple[int, int]:
    """Of the right set: outputs at a time, and samples."""
    rows = min(classes, max(_FORMED_ROWS, _FORMED_ELEMENTS // (m * width)))
    return rows, min(m, max(1, _HELD_ELEMENTS // (rows * width)))


def _of_gradients(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    """Of gradients that are formed, some outputs of some samples at a time: [n, m]."""
    n, m, classes, width = _sizes(left, right, has_bias)
    if has_bias:
        left, right = _with_ones(left), _with_ones(right)
    out = left[0].new_zeros(n, m)
    rows, held = _held(m, classes, width)
    step = max(1, _FORMED_ELEMENTS // (rows * width))
    for first in range(0, m, held):
        some = _samples(*right, first, min(first + held, m))
        for start in range(0, classes, rows):
            slab = slice(start, start + rows)
            others = _formed(some, slab).t()
            for begin in range(0, n, step):
                own = _formed(_samples(*left, begin, min(begin + step, n)), slab)
                out[begin : begin + step, first : first + held].addmm_(own, others)
    return out


def _with_ones(one: Operands) -> Operands:
    delta, act, offsets = one
    return delta, torch.cat([act, act.new_ones(len(act), 1)], dim=1), offsets


def _formed(one: Operands, slab: slice) -> Tensor:
    """Gradients of some outputs: [k, slab D]."""
    delta, act, offsets = one
    if length := equal_length(offsets):
        signal, inputs = delta[:, slab].unflatten(0, (-1, length)), act.unflatten(0, (-1, length))
        return torch.bmm(signal.transpose(1, 2), inputs).flatten(1)
    signal = delta[:, slab].t()
    out = delta.new_empty(len(offsets) - 1, len(signal), act.shape[1])
    for gradient, (first, last) in zip(out, pairwise(offsets.tolist()), strict=True):
        torch.mm(signal[:, first:last], act[first:last], out=gradient)
    return out.flatten(1)


def _of_tokens(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    """Of every pair of tokens, in tiles: [n, m]."""
    (delta, act, offsets), (other_delta, other_act, other_offsets) = left, right
    flat, other_flat = is_flat(offsets), is_flat(other_offsets)
    per_token = delta.new_empty(len(delta), len(other_offsets) - 1)
    others = max(len(other_delta), 1)
    step = max(_TILE_ROWS, _CACHED_ELEMENTS // others)
    step = max(1, min(step, _TILE_ELEMENTS // others))
    for start in range(0, len(delta), step):
        rows = slice(start, start + step)
        if other_flat:
            tile = torch.mm(delta[rows], other_delta.t(), out=per_token[rows])
        else:
            tile = delta[rows] @ other_delta.t()
        features = act[rows] @ other_act.t()
        # k (1 + a.a') of the augmented a~ = [a, 1], and k a.a' without a bias.
        tile = tile.addcmul_(tile, features) if has_bias else tile.mul_(features)
        if not other_flat:
            per_token[rows] = sum_over_tokens(tile.t(), other_offsets).t()
    return per_token if flat else sum_over_tokens(per_token, offsets)
