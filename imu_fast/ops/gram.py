"""Inner products of per-sample gradients, ``K = G G^T``, without G (curvature ``fisher``)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.backend import input_precision
from imu_fast.ops.operation import kernel_dtypes, operation
from imu_fast.ops.tokens import is_flat, sum_over_tokens

# Elements of the two [rows, N] products that exist at once.
_TILE_ELEMENTS = 1 << 22
# Samples in a strip of rows of the symmetric K, of which only what is right of it is computed.
_STRIP = 256
# The kernel's grid has one program per pair of ragged samples, and CUDA's limit is 2^31 - 1.
MAX_KERNEL_SAMPLES = 46_340

Operands = tuple[Tensor, Tensor, Tensor]
"""delta [N, C], act [N, d] and offsets [n+1] of one set of samples."""


def _kernel_limits(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> str:
    many = len(offsets) - 1 > MAX_KERNEL_SAMPLES
    return kernel_dtypes(delta, act) or (f"more than {MAX_KERNEL_SAMPLES} samples" if many else "")


def _launch(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    from imu_fast.kernels import gram as kernel

    ragged = None if is_flat(offsets) else offsets
    return kernel.gram(delta, act, ragged, has_bias, input_precision()).to(delta.dtype)


@operation(kernel=_launch, limits=_kernel_limits)
def gram(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``K[i,j] = sum_{s,t} (delta_is . delta_jt)(a~_is . a~_jt)``.

    The elementwise product of two Gram matrices of tokens, summed over both samples' tokens, in
    tiles of rows; what is left of the diagonal is copied, not computed.

    Args:
        delta: [N, C]. act: [N, d]. offsets: [n+1]. has_bias: whether a~ has a trailing 1.

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


@operation()
def cross_gram(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    """``<g_i, h_j>`` of the samples of two sets, as :func:`gram` has it of one.

    Args:
        left, right: delta [N, C], act [N, d] and offsets [n+1] of each.
        has_bias: whether a~ has a trailing 1.

    Returns:
        [n, m] in delta's dtype.
    """
    return _cross_products(left, right, has_bias)


def _cross_products(left: Operands, right: Operands, has_bias: bool) -> Tensor:
    (delta, act, offsets), (other_delta, other_act, other_offsets) = left, right
    flat, other_flat = is_flat(offsets), is_flat(other_offsets)
    per_token = delta.new_empty(len(delta), len(other_offsets) - 1)
    step = max(1, _TILE_ELEMENTS // max(len(other_delta), 1))
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
