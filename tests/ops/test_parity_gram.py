"""Operands of the Gram matrices of per-sample gradients, and their strips and tiles."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from cases import Call, Case, every_case, every_dtype, factors_of

from imu_fast import reference
from imu_fast.ops.gram import gram


def operands(case, dtype):
    f = factors_of(case, dtype)
    size = float((f[0].abs().sum(1).max() * (f[1].abs().max() + 1)) ** 2) * f[1].shape[1]
    size *= max(case.lengths) ** 2
    return Call(f, case.classes + case.features, [max(size, 1e-30)])


def cross_operands(case, dtype):
    """Against the samples in reverse, of which the first is left out."""
    delta, act, offsets, has_bias = factors_of(case, dtype)
    other = Case("other", (2, *case.lengths[::-1][1:], 1), case.classes, case.features, has_bias)
    right = factors_of(other, dtype)[:3]
    size = max(
        float(d.abs().sum(1).max() * (a.abs().max() + 1)) for d, a in ((delta, act), right[:2])
    )
    size = size**2 * act.shape[1] * max(case.lengths) * max(other.lengths)
    args = ((delta, act, offsets), right, has_bias)
    return Call(args, case.classes + case.features, [max(size, 1e-30)])


OPERANDS = {"gram": {"": operands}, "cross_gram": {"": cross_operands}}


@every_case
@every_dtype
def test_gram_is_symmetric_to_the_last_bit(case, dtype):
    k = gram(*factors_of(case, dtype))
    assert torch.equal(k, k.T)


def test_strips_of_rows_change_nothing(monkeypatch):
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3, 0, 1), 6, 5), torch.float64)
    monkeypatch.setattr(sys.modules["imu_fast.ops.gram"], "_STRIP", 3)
    torch.testing.assert_close(gram(*f), reference.gram(*f))


def test_what_the_kernels_grid_holds():
    """One program for a pair of samples, fewer than 2^31 of them."""
    most = math.isqrt(2**31 - 1)
    delta, act = torch.zeros(1, 1), torch.zeros(1, 1)
    assert gram.limits(delta, act, torch.arange(most + 1), True) == ""
    assert gram.limits(delta, act, torch.arange(most + 2), True) == f"more than {most} samples"


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_tiles_change_nothing(monkeypatch, tile):
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3), 6, 5), torch.float64)
    expected = gram(*f)
    monkeypatch.setattr(sys.modules["imu_fast.ops.gram"], "_TILE_ELEMENTS", tile)
    torch.testing.assert_close(gram(*f), expected)
