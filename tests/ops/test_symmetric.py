"""Sums of symmetric products by strips are those of whole products."""

from __future__ import annotations

import pytest
import torch

from imu_fast.ops import symmetric


@pytest.mark.parametrize("order", [1, 2, 7, 159, 160, 161, 321, 500])
@pytest.mark.parametrize("rows", [0, 1, 3, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_strips_are_the_whole(order, rows, dtype):
    generator = torch.Generator().manual_seed(order + rows)
    x = torch.randn(rows, order, generator=generator, dtype=dtype)
    weight = torch.rand(rows, 1, generator=generator, dtype=dtype)
    start = torch.randn(order, order, generator=generator, dtype=dtype)
    start = start + start.T
    pieces = [(x[s : s + 100] * weight[s : s + 100], x[s : s + 100]) for s in range(0, rows, 100)]
    out = symmetric.add_symmetric(start.clone(), iter(pieces), alpha=-0.5)
    truth = start.double() - 0.5 * (x * weight).double().T @ x.double()
    close = (rows + 4) * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=close * float(truth.abs().max()))


def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 400, dtype=torch.float64)
    x[1, 250] = float("inf")
    out = symmetric.add_symmetric(x.new_zeros(400, 400), [(x, x)])
    assert not bool(out[250].isfinite().any()) and not bool(out[:, 250].isfinite().any())


@pytest.mark.parametrize("width", [0, 1, 100, 10_000, 1_000_000])
def test_pieces_have_rows(width):
    assert symmetric.rows_at_once(width) >= 128
