"""Sums of squared products: what the empirical Fisher's diagonal is where samples have tokens.

On the CPU through ``imu_fast._C``, which squares each tile of a sample's product in registers; the
product of torch is squared from the cache where the extension is not.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from imu_fast import backend
from imu_fast.ops.extension import SUFFIX, loaded_for

# Elements of a sample's product, for each thread, that are squared before the next are computed: so
# many stay in its cache. A product of fewer rows than these is slow for its size.
_SLAB_ELEMENTS, _SLAB_ROWS = 1 << 17, 64
# Elements of views that are copied at once.
_COPIED_ELEMENTS = 1 << 22


def extension(tensor: Tensor) -> Any:
    """The compiled module for what lies where this tensor does; None: torch."""
    return None if backend.current_backend() == "reference" else loaded_for(tensor)


def add_squared_products(
    total: Tensor, left: Tensor, right: Tensor, axes: int = 1, offsets: Tensor | None = None
) -> None:
    """``total += sum_i (left_i^T right_i)^2``, elementwise, with no ``[n, R, K]`` kept.

    Strides are free, so that a view may be what a copy of it would be: a convolution's patches.

    Args:
        total: [R, K], each row contiguous. left: [n, *tokens, *R]. right: [n, *tokens, *K].
        axes: how many of a token there are; theirs are alike in both.
        offsets: [n+1] int64; then left is [N, *R] and right [N, *K], and sample i has the tokens
            from ``offsets[i]`` to ``offsets[i+1]``.
    """
    if not total.numel() or not left.numel() or not right.numel():
        return
    found = extension(total)
    if found is not None and total.stride(1) == 1:
        _by_extension(found, total, left, right, axes, offsets)
        return
    rows, columns = total.shape
    if offsets is not None:
        cuts = [slice(*ends) for ends in pairwise(offsets.tolist())]
        pairs = [(left[cut].reshape(-1, rows), right[cut].reshape(-1, columns)) for cut in cuts]
        _by_torch(total, pairs)
        return
    tokens = prod(left.shape[1 : 1 + axes])
    step = max(1, _COPIED_ELEMENTS // (tokens * max(total.shape)))
    for some, other in zip(left.split(step), right.split(step), strict=True):
        flat = some.reshape(-1, tokens, rows), other.reshape(-1, tokens, columns)
        _by_torch(total, list(zip(*flat, strict=True)))


def _by_torch(total: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Some rows at a time, of all samples one after the other."""
    step = max(_SLAB_ROWS, _SLAB_ELEMENTS * torch.get_num_threads() // total.shape[1])
    made = total.new_empty(min(step, len(total)), total.shape[1])
    for start in range(0, len(total), step):
        slab = total[start : start + step]
        product = made[: len(slab)]
        for left, right in pairs:
            torch.mm(left[:, start : start + step].t(), right, out=product)
            slab.addcmul_(product, product)


def _table(shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Where the elements of a view lie: [prod(shape)]."""
    at = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(shape, strides, strict=True):
        at = at[..., None] + torch.arange(size) * stride
    return at.flatten()


def _by_extension(
    found: Any, total: Tensor, left: Tensor, right: Tensor, axes: int, offsets: Tensor | None
) -> None:
    axes = 0 if offsets is not None else axes
    if offsets is not None:
        starts, lengths = offsets[:-1].cpu(), offsets.diff().cpu()
        longest = torch.Size([int(lengths.max())])
    else:
        starts = torch.arange(len(left))
        longest = left.shape[1 : 1 + axes]
        lengths = torch.full((len(left),), prod(longest))
    held = [lengths]
    addresses = []
    for tensor in (left.detach(), right.detach()):
        first, *strides = tensor.stride()
        tables = [
            starts * first,
            _table(longest, (first,) if offsets is not None else tuple(strides[:axes])),
            _table(tensor.shape[1 + axes :], tuple(strides[axes:])),
        ]
        held += tables
        addresses.append([tensor.data_ptr(), *(table.data_ptr() for table in tables)])
    getattr(found, f"squared_products_{SUFFIX[total.dtype]}")(
        *addresses,
        lengths.data_ptr(),
        len(lengths),
        total.data_ptr(),
        *total.shape,
        total.stride(0),
        torch.get_num_threads(),
    )
