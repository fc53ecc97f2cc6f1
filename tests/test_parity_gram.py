"""The Gram matrix of per-sample gradients against reference.py."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import Case, assert_close, every_case, every_dtype, factors_of

from imu_fast import reference
from imu_fast.ops.gram import gram


@every_case
@every_dtype
def test_gram(case, dtype):
    f = factors_of(case, dtype)
    size = float((f[0].abs().sum(1).max() * (f[1].abs().max() + 1)) ** 2) * f[1].shape[1]
    size *= max(case.lengths) ** 2
    k = gram(*f)
    assert_close(k, reference.gram(*f), case.classes + case.features, max(size, 1e-30))
    assert torch.equal(k, k.T)


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_tiles_change_nothing(monkeypatch, tile):
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3), 6, 5), torch.float64)
    expected = gram(*f)
    monkeypatch.setattr(sys.modules["imu_fast.ops.gram"], "_TILE_ELEMENTS", tile)
    torch.testing.assert_close(gram(*f), expected)
