"""The damped Cholesky solve beside torch.linalg and scipy: batches, and one matrix.

On two threads, and (where there is one) on the GPU, where a round ends when the device has done its
work. Floor: ``batch P^3 / 3`` multiply-adds to factor, counted as two FLOPs each.
"""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu

pytestmark = pytest.mark.usefixtures("two_threads")

LAM = 1e-2
# What ggn_block solves; what the primal GGN of a small head does; a large single matrix.
SIZES = [(100, 129), (1, 129), (1, 2048)]
# One matrix from what fits a thread block's shared memory to what fills the device; batches that
# do, and that are too large for shared memory.
CUDA_SIZES = [
    *((1, order) for order in (256, 1024, 4096, 16384)),
    *((100, 129), (1000, 65), (1000, 257), (64, 512)),
]


def damped(a):
    a = a.clone()
    a.diagonal(dim1=-2, dim2=-1).add_(LAM)
    return a


def by_torch(a, b):
    return torch.cholesky_solve(b, torch.linalg.cholesky(damped(a)))


def by_torch_unchecked(a, b):
    return torch.cholesky_solve(b, torch.linalg.cholesky_ex(damped(a)).L)


def by_scipy(a, b):
    linalg, found = pytest.importorskip("scipy.linalg"), []
    for matrix, rhs in zip(damped(a).numpy(), b.numpy(), strict=True):
        factor = linalg.cho_factor(matrix, overwrite_a=True, check_finite=False)
        found.append(torch.from_numpy(linalg.cho_solve(factor, rhs, check_finite=False)))
    return torch.stack(found)


SOLVERS = {
    "imu_fast": lambda a, b: imu.damped_cholesky_solve(a, b, LAM),
    "torch.linalg": by_torch,
    "scipy": by_scipy,
}
# As above and, of the same work, nothing read back: what a loop that goes on on the device sees.
CUDA_SOLVERS = {
    "checked": (SOLVERS["imu_fast"], by_torch),
    "unchecked": (
        lambda a, b: imu.damped_cholesky_solve(a, b, LAM, check=False),
        by_torch_unchecked,
    ),
}


def problem(size, dtype, device):
    batch, order = size
    generator = torch.Generator(device).manual_seed(0)
    options = dict(generator=generator, dtype=dtype, device=device)
    x = torch.randn(batch, order, order, **options)
    return x @ x.mT / order, torch.randn(batch, order, 1, **options)


def run(benchmark, size, dtype, role, solver, device, label="", **extra):
    (batch, order), (a, b) = size, problem(size, dtype, device)
    # No timing on a red gate: backward error of the dtype.
    error = float((damped(a) @ solver(a, b) - b).norm() / b.norm())
    assert error <= 1e4 * order * torch.finfo(dtype).eps

    def timed():
        solver(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{batch} x {order}, {dtype}, {device}{label}"
    flops = 2 * batch * order**3 // 3
    benchmark.extra_info.update(role=role, samples=batch, flops=flops, **extra)
    benchmark.pedantic(timed, rounds=15, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("role", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_damped_cholesky(benchmark, size, dtype, role):
    run(benchmark, size, dtype, role, SOLVERS[role], "cpu", threads=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("role", ["imu_fast", "torch.linalg"])
@pytest.mark.parametrize("status", CUDA_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", CUDA_SIZES, ids=str)
def test_damped_cholesky_on_cuda(benchmark, size, dtype, status, role):
    solver = CUDA_SOLVERS[status][role != "imu_fast"]
    card = torch.cuda.get_device_name()
    extra = {"card": card, "backend": imu.backends()["cuda"].reason}
    run(benchmark, size, dtype, role, solver, "cuda", f", {status}", **extra)
