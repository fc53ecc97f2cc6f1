"""Sums of squared products, compiled and not, against their formula in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from imu_fast.ops import squared_products
from imu_fast.ops.squared_products import add_squared_products

HAS = squared_products.extension(torch.zeros(1)) is not None
WAYS = [
    pytest.param("extension", marks=pytest.mark.skipif(not HAS, reason="no compiled module")),
    "torch",
]
# Samples, tokens, rows, columns: one of each; less and more than a tile in every version; samples
# of more tokens than go together; more than one left block of rows; panels that threads share.
SIZES = [
    (1, 1, 1, 1),
    (3, 5, 7, 11),
    (2, 300, 13, 33),
    (40, 17, 24, 64),
    (65, 16, 4100, 3),
    (5, 4, 97, 700),
]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(squared_products, "extension", lambda tensor: None)
    return request.param


def check(total, first, second, **how):
    """first, second: [M_i, R] and [M_i, K] of each sample; the call's own are in ``how``."""
    found = total.clone()
    add_squared_products(found, **how)
    pairs = [(a.double().t(), b.double()) for a, b in zip(first, second, strict=True)]
    products, scale = [a @ b for a, b in pairs], [a.abs() @ b.abs() for a, b in pairs]
    want = total.double() + sum(g.square() for g in products)
    longest = max(map(len, first))
    # Of each product M eps sum |a b|, twice since it is squared; and of the sum over samples.
    eps = torch.finfo(total.dtype).eps
    bound = sum(2 * (longest + 2) * eps * s.square() for s in scale) + (len(first) + 1) * eps * want
    assert bool(((found.double() - want).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize(
    "dtype, threads", [(torch.float32, 1), (torch.float32, 2), (torch.float64, 7)]
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squares_are_added(way, size, dtype, threads):
    n, m, rows, columns = size
    left, right = torch.randn(n, m, rows, dtype=dtype), torch.randn(n, m, columns, dtype=dtype)
    total = torch.rand(rows, columns + 1, dtype=dtype)[:, :columns]  # its rows lie apart
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(total, left, right, left=left, right=right)
    finally:
        torch.set_num_threads(before)


def test_what_lies_beside_is_untouched(way):
    wide = torch.zeros(9, 20)
    add_squared_products(wide[1:8, 2:13], torch.randn(3, 5, 7), torch.randn(3, 5, 11))
    inside = wide[1:8, 2:13].clone()
    wide[1:8, 2:13] = 0
    assert bool((inside > 0).all()) and float(wide.abs().sum()) == 0


def test_samples_of_many_lengths(way):
    offsets = torch.tensor([0, 0, 3, 10, 10, 11, 311])
    left, right = torch.randn(311, 13), torch.randn(311, 19)
    cuts = [slice(a, b) for a, b in pairwise(offsets.tolist())]
    parts = [left[c] for c in cuts], [right[c] for c in cuts]
    check(torch.zeros(13, 19), *parts, left=left, right=right, offsets=offsets)


def test_views_of_any_strides(way):
    """Two axes of tokens and two of columns; overlapping, turned, stretched."""
    x = torch.randn(3, 5, 8, 2)
    patches = x.unfold(1, 3, 1)  # [3, 3, 8, 2, 3]
    left = torch.randn(3, 7, 8, 3).permute(0, 3, 2, 1)
    check(
        torch.zeros(7, 6),
        left.reshape(3, 24, 7),
        patches.reshape(3, 24, 6),
        left=left,
        right=patches,
        axes=2,
    )
    one = torch.randn(1, 4, 6).expand(3, 4, 6)
    check(torch.zeros(6, 6), one, one, left=one, right=one)


def test_nothing_adds_nothing(way):
    total = torch.ones(3, 4)
    add_squared_products(total, torch.empty(2, 0, 3), torch.empty(2, 0, 4))
    add_squared_products(total, torch.empty(0, 2, 3), torch.empty(0, 2, 4))
    none = torch.zeros(3, dtype=torch.int64)
    add_squared_products(total, torch.empty(0, 3), torch.empty(0, 4), offsets=none)
    assert bool((total == 1).all())


def test_not_a_number_stays_where_it_is(way):
    left, right = torch.ones(3, 5, 13), torch.ones(3, 5, 19)
    left[1, 4, 12] = torch.nan
    right[2, 0, 18] = torch.inf
    total = torch.zeros(13, 19)
    add_squared_products(total, left, right)
    assert bool(total[12].isnan().all()) and bool(total[:12, 18].isinf().all())
    assert bool((total[:12, :18] == 75).all())
