"""Inner products of per-sample gradients, ``K = G G^T``, without G (SPEC section 2, ``fisher``)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast import backend
from imu_fast.ops.tokens import is_flat, sum_over_tokens

# Elements of the two [rows, N] products that exist at once.
_TILE_ELEMENTS = 1 << 22
# The kernel's grid has one program per pair of ragged samples, and CUDA's limit is 2^31 - 1.
MAX_KERNEL_SAMPLES = 46_340


def gram(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``K[i,j] = sum_{s,t} (delta_is . delta_jt)(a~_is . a~_jt)``.

    The elementwise product of two Gram matrices of tokens, summed over both samples' tokens, in
    tiles of rows.

    Args:
        delta: [N, C]. act: [N, d]. offsets: [n+1]. has_bias: whether a~ has a trailing 1.

    Returns:
        [n, n] in delta's dtype, symmetric to the last bit.
    """
    limits = backend.kernel_limits(delta, act)
    if len(offsets) - 1 > MAX_KERNEL_SAMPLES:
        limits = limits or f"more than {MAX_KERNEL_SAMPLES} samples"
    which = backend.resolve("gram", ("reference", "torch", "triton"), delta, limits)
    if which == "triton":
        from imu_fast.kernels import gram as kernel

        ragged = None if is_flat(offsets) else offsets
        k = kernel.gram(delta, act, ragged, has_bias, backend.input_precision())
        return k.to(delta.dtype)
    if which == "reference":
        from imu_fast import reference

        return reference.gram(delta, act, offsets, has_bias).to(delta.dtype)
    tokens, n = len(delta), len(offsets) - 1
    flat = is_flat(offsets)
    per_token = delta.new_empty(tokens, n)
    step = max(1, _TILE_ELEMENTS // max(tokens, 1))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        tile = act[rows] @ act.t()
        if has_bias:
            tile.add_(1.0)
        tile.mul_(delta[rows] @ delta.t())
        per_token[rows] = tile if flat else sum_over_tokens(tile.t(), offsets).t()
    k = per_token if flat else sum_over_tokens(per_token, offsets)
    return torch.tril(k) + torch.tril(k, -1).t()
