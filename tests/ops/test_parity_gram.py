"""The Gram matrix of per-sample gradients against reference.py."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import Case, assert_close, every_case, every_dtype, factors_of

from imu_fast import reference
from imu_fast.ops.gram import cross_gram, gram


@every_case
@every_dtype
def test_gram(case, dtype):
    f = factors_of(case, dtype)
    size = float((f[0].abs().sum(1).max() * (f[1].abs().max() + 1)) ** 2) * f[1].shape[1]
    size *= max(case.lengths) ** 2
    k = gram(*f)
    assert_close(k, reference.gram(*f), case.classes + case.features, max(size, 1e-30))
    assert torch.equal(k, k.T)


@every_case
@every_dtype
def test_cross_gram(case, dtype):
    """Against the samples in reverse, of which the first is left out."""
    delta, act, offsets, has_bias = factors_of(case, dtype)
    other = Case("other", (2, *case.lengths[::-1][1:], 1), case.classes, case.features, has_bias)
    right = factors_of(other, dtype)[:3]
    size = max(
        float(d.abs().sum(1).max() * (a.abs().max() + 1)) for d, a in ((delta, act), right[:2])
    )
    size = size**2 * act.shape[1] * max(case.lengths) * max(other.lengths)
    found = cross_gram((delta, act, offsets), right, has_bias)
    g, h = (
        reference.sample_gradients(*one, has_bias).flatten(1)
        for one in ((delta, act, offsets), right)
    )
    assert_close(found, g @ h.T, case.classes + case.features, max(size, 1e-30))


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_tiles_change_nothing(monkeypatch, tile):
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3), 6, 5), torch.float64)
    expected = gram(*f)
    monkeypatch.setattr(sys.modules["imu_fast.ops.gram"], "_TILE_ELEMENTS", tile)
    torch.testing.assert_close(gram(*f), expected)
