"""Operands of the Fisher diagonal, and its tiles."""

from __future__ import annotations

import pytest
import torch
from cases import Call, Case, factors_of

from imu_fast import reference
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal


def operands(case, dtype):
    f = factors_of(case, dtype)
    size = float((f[0].abs().max() * f[1].abs().max()) ** 2) * max(case.lengths)
    return Call(f, len(f[0]), [max(size, 1e-30)])


OPERANDS = {"fisher_diagonal": {"": operands}}


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_fisher_diagonal_of_tokens_does_not_depend_on_the_tile(monkeypatch, tile):
    import sys

    module = sys.modules["imu_fast.ops.fisher_diagonal"]
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3, 3), 6, 5), torch.float64)
    expected = reference.fisher_diagonal(*f)
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    torch.testing.assert_close(fisher_diagonal(*f), expected)
    x = torch.rand_like(expected)
    torch.testing.assert_close(
        quadratic_scores(*f[:2], x, *f[2:]), reference.quadratic_scores(*f[:2], x, *f[2:])
    )


@pytest.mark.parametrize("has_bias", [True, False])
def test_samples_whose_gradients_are_large_stand_alone(has_bias):
    classes, d = 130, 140  # 18,200 entries, beyond the 16,384 of what is batched
    offsets = torch.tensor([0, 0, 3, 10, 10, 11])
    delta, act = torch.randn(11, classes).double(), torch.randn(11, d).double()
    found = fisher_diagonal(delta, act, offsets, has_bias)
    truth = reference.fisher_diagonal(delta, act, offsets, has_bias)
    torch.testing.assert_close(found, truth)
