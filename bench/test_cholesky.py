"""The damped Cholesky solve beside torch.linalg and scipy: batches, and one matrix.

On two threads, and (where there is one) on the GPU, where a round ends when the device has done its
work. Floor: ``batch P^3 / 3`` FLOPs to factor.

On the GPU alone, too: factors in TF32 and bf16 beside float32's, alone and refined to a residual.
"""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast.solvers.cholesky import low_precision
from imu_fast.solvers.cholesky.cholesky import damped_cholesky

pytestmark = pytest.mark.usefixtures("two_threads")

LAM = 1e-2
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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


def run(benchmark, size, dtype, role, solver, device, label="", rounds=15, goal=None, **extra):
    """``goal``: on the relative residual; if None, the backward error of the dtype."""
    (batch, order), (a, b) = size, problem(size, dtype, device)
    # No timing on a red gate.
    error = float((damped(a.double()) @ solver(a, b).double() - b).norm() / b.norm())
    assert error <= (goal or 1e4 * order * torch.finfo(dtype).eps)

    def timed():
        solver(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{batch} x {order}, {dtype}, {device}{label}"
    flops = batch * order**3 // 3
    benchmark.extra_info.update(role=role, samples=batch, flops=flops, **extra)
    benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("role", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_damped_cholesky(benchmark, size, dtype, role):
    run(benchmark, size, dtype, role, SOLVERS[role], "cpu", threads=2)


def _followed(solver):
    """The solve and its derivatives in A and b."""

    def run(a, b):
        leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
        x = solver(*leaves)
        torch.autograd.grad(x.sum(), leaves)
        return x.detach()

    return run


@pytest.mark.parametrize("role", ["imu_fast", "torch.linalg"])
@pytest.mark.parametrize("size", [(1, 4), (64, 8), *SIZES], ids=str)
def test_damped_cholesky_and_backward(benchmark, size, role):
    solver = _followed(SOLVERS[role])
    run(benchmark, size, torch.float32, role, solver, "cpu", ", and backward", threads=2)


@needs_gpu
@pytest.mark.parametrize("role", ["imu_fast", "torch.linalg"])
@pytest.mark.parametrize("status", CUDA_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", CUDA_SIZES, ids=str)
def test_damped_cholesky_on_cuda(benchmark, size, dtype, status, role):
    solver = CUDA_SOLVERS[status][role != "imu_fast"]
    card = torch.cuda.get_device_name()
    extra = {"card": card, "backend": imu.backends()["cuda"].reason}
    run(benchmark, size, dtype, role, solver, "cuda", f", {status}", **extra)


# Where products of blocks are most of the work. A round of the largest is some 0.1 s.
LARGE = [1024, 4096, 16384]
PRECISIONS = {"imu_fast": None, "float32 factor": "ieee"}


def refined(precision, tolerance):
    def solve(a, b):
        factor = damped_cholesky(a, LAM, precision=precision)
        assert factor.precision == precision, "timed would be the fallback"
        return factor.solve_refined(b, tolerance).x

    return solve


@needs_gpu
@pytest.mark.parametrize("role", PRECISIONS)
@pytest.mark.parametrize("tolerance", [1e-6, 1e-12])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("order", LARGE)
def test_mixed_precision_refined(benchmark, order, precision, tolerance, role):
    solver = refined(PRECISIONS[role] or precision, tolerance)
    label, size = f", {precision} factor refined to {tolerance:g}", (1, order)
    extra = {"card": torch.cuda.get_device_name(), "rounds": 5, "goal": 2 * tolerance}
    run(benchmark, size, torch.float32, role, solver, "cuda", label, **extra)


def factor_alone(precision, block):
    def solve(a, b):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(low_precision, "BLOCK", block)
            return damped_cholesky(a, LAM, precision=precision, check=False).solve(b)

    return solve


BLOCKS = {"imu_fast": low_precision.BLOCK, "blocks of 256": 256, "blocks of 1024": 1024}


@needs_gpu
@pytest.mark.parametrize("role", [*BLOCKS, "float32 factor"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("order", LARGE[1:])
def test_mixed_precision_blocks(benchmark, order, precision, role):
    """The factor and one solve, unrefined; goal: that it is no noise."""
    solver = factor_alone(*((precision, BLOCKS[role]) if role in BLOCKS else ("ieee", 512)))
    label, size = f", {precision} factor and a solve", (1, order)
    extra = {"card": torch.cuda.get_device_name(), "rounds": 5, "goal": 0.5}
    run(benchmark, size, torch.float32, role, solver, "cuda", label, **extra)
