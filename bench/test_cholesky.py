"""The damped Cholesky solve beside torch.linalg and scipy, on two threads: batches and one matrix.

Floor: ``batch P^3 / 3`` multiply-adds to factor, counted as two FLOPs each.
"""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

import imu_fast as imu

LAM = 1e-2
# What ggn_block solves; what the primal GGN of a small head does; a large single matrix.
SIZES = [(100, 129), (1, 129), (1, 2048)]


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def damped(a):
    a = a.clone()
    a.diagonal(dim1=-2, dim2=-1).add_(LAM)
    return a


def by_torch(a, b):
    return torch.cholesky_solve(b, torch.linalg.cholesky(damped(a)))


def by_scipy(a, b):
    found = []
    for matrix, rhs in zip(damped(a).numpy(), b.numpy(), strict=True):
        factor = scipy.linalg.cho_factor(matrix, overwrite_a=True, check_finite=False)
        found.append(torch.from_numpy(scipy.linalg.cho_solve(factor, rhs, check_finite=False)))
    return torch.stack(found)


SOLVERS = {
    "imu_fast": lambda a, b: imu.damped_cholesky_solve(a, b, LAM),
    "torch.linalg": by_torch,
    "scipy": by_scipy,
}


@pytest.mark.parametrize("role", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_damped_cholesky(benchmark, size, dtype, role):
    batch, order = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, order, order, generator=generator, dtype=dtype)
    a, b = x @ x.mT / order, torch.randn(batch, order, 1, generator=generator, dtype=dtype)
    # No timing on a red gate: backward error of the dtype.
    found = SOLVERS[role](a, b)
    error = float((damped(a) @ found - b).norm() / b.norm())
    assert error <= 1e4 * order * torch.finfo(dtype).eps
    benchmark.group = f"{batch} x {order}, {dtype}"
    flops = 2 * batch * order**3 // 3
    benchmark.extra_info.update(role=role, samples=batch, flops=flops, threads=2)
    benchmark.pedantic(lambda: SOLVERS[role](a, b), rounds=15, iterations=1, warmup_rounds=2)
