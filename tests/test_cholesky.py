"""The damped Cholesky solve: both paths against a float64 solve, and its errors."""

from __future__ import annotations

import sys

import pytest
import torch

import imu_fast as imu
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.solvers.cholesky import damped_cholesky

cholesky = sys.modules["imu_fast.solvers.cholesky"]


@pytest.fixture(params=["extension", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cholesky, "_extension", lambda: None)
    elif not imu.backends()["extension"].available:
        pytest.skip(imu.backends()["extension"].reason)
    return request.param


@pytest.fixture(params=["torch", "scipy"])
def lapack(request, monkeypatch):
    """Each library that LAPACK may come from."""
    if not imu.backends()["extension"].available:
        pytest.skip(imu.backends()["extension"].reason)
    try:
        found = getattr(cholesky, f"_{request.param}_lapack")()
    except (OSError, AttributeError, ImportError) as error:
        pytest.skip(f"no LAPACK in {request.param}: {error}")
    from imu_fast import _C

    monkeypatch.setattr(cholesky, "_extension", lambda: (_C, found))
    return found


# One; odd; beside and beyond a register block; beyond the side-by-side limit.
ORDERS = [1, 2, 7, 64, 129, 600]


def spd(order, batch=(), dtype=torch.float64, rank=None):
    x = torch.randn(*batch, order, rank or order, dtype=torch.float64)
    return (x @ x.mT / order).to(dtype)


def check(a, b, damping):
    before = a.clone()
    x = imu.damped_cholesky_solve(a, b, damping)
    assert torch.equal(a, before)
    damped = a.double() + damping * torch.eye(a.shape[-1], dtype=torch.float64)
    columns = b.double()[..., None] if b.dim() == a.dim() - 1 else b.double()
    truth = torch.linalg.solve(damped, columns).reshape(b.shape)
    # Backward stable: relative error at most a small multiple of P eps cond.
    bound = 10 * a.shape[-1] * torch.finfo(a.dtype).eps * float(torch.linalg.cond(damped).max())
    assert x.shape == b.shape and x.dtype == b.dtype
    assert float((x.double() - truth).norm() / truth.norm()) <= bound


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_single(path, order, dtype):
    check(spd(order, dtype=dtype), torch.randn(order, dtype=dtype), 1e-2)
    check(spd(order, dtype=dtype), torch.randn(order, 3, dtype=dtype), 1e-2)
    assert damped_cholesky(spd(order, dtype=dtype), 1.0).backend == path


@pytest.mark.parametrize("order", [1, 7, 129])
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)], ids=str)
def test_batched(path, order, batch):
    check(spd(order, batch, torch.float32), torch.randn(*batch, order), 1e-1)
    check(spd(order, batch), torch.randn(*batch, order, 4, dtype=torch.float64), 1e-1)


def test_every_lapack(lapack):
    check(spd(9, (3,)), torch.randn(3, 9, 2, dtype=torch.float64), 1e-2)
    check(spd(9, (3,), torch.float32), torch.randn(3, 9, 2), 1e-2)


def test_layouts_and_rank_deficiency(path):
    wide = torch.randn(8, 16, 8, dtype=torch.float64)
    a = (wide.mT @ wide)[::2]
    check(a, torch.randn(3, 8, 4, dtype=torch.float64).permute(2, 1, 0), 1e-3)
    check(a.mT, torch.randn(4, 8, 1, dtype=torch.float64), 1e-3)
    check(spd(20, rank=3), torch.randn(20, dtype=torch.float64), 1e-4)
    single_column = torch.randn(8, 1, dtype=torch.float64)
    kept = single_column.clone()
    imu.damped_cholesky_solve(a[0], single_column, 1.0)
    assert torch.equal(single_column, kept)


def test_factor_is_reusable_and_knows_its_determinant(path):
    a = spd(12, (2,))
    factor = damped_cholesky(a, 0.5)
    damped = a + 0.5 * torch.eye(12)
    torch.testing.assert_close(factor.logdet(), torch.logdet(damped))
    for _ in range(2):
        b = torch.randn(2, 12, dtype=torch.float64)
        torch.testing.assert_close(damped @ factor.solve(b)[..., None], b[..., None])


def test_indefinite_matrices_say_what_would_work(path):
    a = spd(6, (3,))
    a[1] = torch.diag(torch.tensor([1.0, 1.0, -2.0, 1.0, 1.0, 1.0]))
    with pytest.raises(SingularMatrixError, match=r"matrix 1 of 3.*pivot 3 of 6.*smallest") as info:
        damped_cholesky(a, 0.1)
    assert (info.value.pivot, info.value.index) == (3, 1)
    smallest = info.value.smallest_damping
    assert 2.0 <= smallest < 2.1
    damped_cholesky(a, smallest)
    with pytest.raises(SingularMatrixError, match="pivot 3 of 6") as info:
        damped_cholesky(a[1].float(), 0.1)
    assert info.value.index is None
    damped_cholesky(a[1].float(), info.value.smallest_damping)


def test_bad_input():
    a, b = spd(4), torch.randn(4, dtype=torch.float64)
    solve = imu.damped_cholesky_solve
    for damping in (0, -1, float("nan")):
        with pytest.raises(InputError, match="damping="):
            solve(a, b, damping)
    with pytest.raises(InputError, match=r"A has shape \(4, 3\)"):
        solve(a[:, :3], b, 1.0)
    with pytest.raises(InputError, match=r"b has shape \(3,\); expected \(4,\)"):
        solve(a, b[:3], 1.0)
    with pytest.raises(InputError, match=r"b is torch.float32, A is torch.float64"):
        solve(a, b.float(), 1.0)
    with pytest.raises(InputError, match=r"pass float32 or float64"):
        solve(a.half(), b.half(), 1.0)
    with pytest.raises(InputError, match="A is not finite"):
        solve(a * torch.nan, b, 1.0)
    with pytest.raises(InputError, match="b is not finite"):
        solve(a, b * torch.inf, 1.0)
