"""The Cholesky factor with TF32 or bf16 products: rounding, its bound, refinement, CUDA's calls."""

from __future__ import annotations

import contextlib
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import cuda_stand_in
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import imu_fast as imu
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.precision import ask_float32_products, float32_products
from imu_fast.solvers.cholesky import lapack, low_precision
from imu_fast.solvers.cholesky.cholesky import damped_cholesky, factor_plain

BLOCK = 32
# One block and a bit; no multiple of the block; a multiple.
ORDERS = [33, 100, 160]
every_precision = pytest.mark.parametrize("precision", ["tf32", "bf16"])
EPS32 = torch.finfo(torch.float32).eps
wide = torch.float64


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(low_precision, "BLOCK", BLOCK)


@pytest.fixture(params=["extension", "torch", "cuda"])
def path(request, monkeypatch):
    """What factors the diagonal blocks and solves; CUDA's calls by a stand-in, on CPU tensors."""
    if request.param == "torch":
        monkeypatch.setattr(lapack, "extension", lambda: None)
    elif not imu.backends()["extension"].available:
        pytest.skip(imu.backends()["extension"].reason)
    elif request.param == "cuda":
        cuda_stand_in.install(monkeypatch)
        monkeypatch.setattr(low_precision, "_on_matrix_units", lambda tensor: True)
        monkeypatch.setattr(low_precision, "_multiply_bf16", multiply_bf16)
    return request.param


def multiply_bf16(left, right):
    assert left.dtype == right.dtype == torch.bfloat16
    return left.float() @ right.float()


def orthogonal(order):
    return torch.linalg.qr(torch.randn(order, order, dtype=wide))[0]


def matrix(kind, order):
    """A float64 matrix; how little damping it needs is the bound's to say."""
    if kind == "rank-deficient":
        x = torch.randn(order, 3, dtype=wide)
    elif kind == "duplicated rows":
        x = torch.randn(order, 2 * order, dtype=wide)
        x[1::2] = x[: 2 * (order // 2) : 2]
    elif kind == "graded":
        x = (
            torch.randn(order, 2 * order, dtype=wide)
            * torch.logspace(0, -4, order, dtype=wide)[:, None]
        )
    else:
        exponent = float(kind.removeprefix("condition 1e"))
        x = orthogonal(order) * torch.logspace(0, -exponent / 2, order, dtype=wide) * order**0.5
    return x @ x.mT / order


KINDS = [
    *("condition 1e1", "condition 1e2", "condition 1e4", "condition 1e8"),
    *("rank-deficient", "duplicated rows", "graded"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def damped(a, damping):
    return a.double() + damping * torch.eye(a.shape[-1], dtype=wide)


def bound(a, damping, precision):
    """As the module's docstring has it."""
    trace = float(damped(a, damping).trace())
    low = float(low_precision.rounding_bound(a, damping, precision))
    return low + (a.shape[-1] + 8) * EPS32 * trace


def sufficient(a, precision):
    """A damping above the bound with that damping."""
    damping = 0.0
    for _ in range(30):
        damping = 1.01 * bound(a, damping, precision)
    assert damping > bound(a, damping, precision)
    return damping


def backward_error(factor, a):
    u = factor.factor.double().triu()
    return u.mT @ u - damped(a, factor.damping)


def is_bf16(x):
    return bool((x.bfloat16().to(x.dtype) == x).all())


# Rounding


def to_tf32(x):
    """To 11 significant bits, or to TF32's smallest subnormal, by float64 arithmetic."""
    _, exponent = torch.frexp(x.double())
    quantum = torch.ldexp(torch.ones_like(x, dtype=wide), exponent.clamp_min(-125) - 11)
    return (torch.round(x.double() / quantum) * quantum).float()


def test_tf32_is_the_nearest_of_eleven_significant_bits():
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    ties = ((bits & ~0x1FFF) | 0x1000).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 3.4028235e38, torch.inf, -torch.inf])
    for numbers in (x[x.isfinite()], ties[ties.isfinite()], edges):
        found, expected = low_precision.round_tf32(numbers), to_tf32(numbers)
        expected = torch.where(numbers.isfinite(), expected, numbers)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        assert not bool((found.view(torch.int32) & 0x1FFF).any())
    # Every mantissa of ones, which is CUDA's NaN: a carry must not make a number of it.
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32)
    assert bool(low_precision.round_tf32(nans.view(torch.float32)).isnan().all())


# The factor


@every_precision
@every_kind
@pytest.mark.parametrize("order", ORDERS)
def test_the_factor_exists_and_is_as_good_as_its_bound_says(path, caplog, kind, order, precision):
    a = matrix(kind, order).float()
    damping = sufficient(a, precision)
    factor = damped_cholesky(a, damping, precision=precision)
    assert (factor.precision, factor.backend, factor.factor.dtype) == (
        precision,
        path,
        torch.float32,
    )
    assert not caplog.records
    error = backward_error(factor, a)
    assert float(error.norm()) <= bound(a, damping, precision)
    # Scaled to a unit diagonal too.
    scale = damped(a, damping).diagonal().rsqrt()
    scaled = error * scale[:, None] * scale
    assert float(scaled.norm()) <= bound(
        damped(a, damping) * scale[:, None] * scale, 0.0, precision
    )


@every_precision
def test_rounding_is_in_every_block_beside_the_diagonal_alone(path, precision):
    a = matrix("condition 1e1", 100).float()
    factor = damped_cholesky(a, 0.1, precision=precision)
    u, error = factor.factor, backward_error(factor, a).abs()
    rounded = is_bf16 if precision == "bf16" else lambda x: torch.equal(x, to_tf32(x))
    float32 = (a.shape[-1] + 8) * EPS32 * float(damped(a, 0.1).trace())
    for k in range(0, 100, BLOCK):
        here, right = slice(k, k + BLOCK), slice(k + BLOCK, 100)
        assert not rounded(u[here, here].triu())
        assert rounded(u[here, right])
        assert float(error[here, here].norm()) <= float32
        most = float(u[here, here].triu().norm() * u[here, right].norm())
        assert (
            float(error[here, right].norm()) <= low_precision.ROUNDOFF[precision] * most + float32
        )


@every_precision
def test_graded_matrices_need_little_damping(path, precision):
    a = matrix("graded", 160)
    factor = damped_cholesky(a.float(), 1e-12, precision=precision)
    assert factor.precision == precision  # far below roundoff times the norm
    b = torch.randn(160, dtype=wide)
    assert factor.solve_refined(b).residual <= 1e-12


@every_precision
def test_only_the_upper_triangle_is_read(path, precision):
    a = matrix("condition 1e2", 100).float()
    expected = damped_cholesky(a, 0.1, precision=precision)
    nan = torch.full_like(a, torch.nan).tril(-1)
    found = damped_cholesky(a.triu() + nan, 0.1, precision=precision)
    assert torch.equal(found.factor.triu(), expected.factor.triu())
    assert torch.equal(found.solve(torch.ones(100)), expected.solve(torch.ones(100)))


@every_precision
@pytest.mark.parametrize("batch", [(1,), (2, 2)], ids=str)
def test_batches_and_layouts(path, precision, batch):
    a = torch.stack([matrix(KINDS[i], 70) for i in range(4)])[: len(batch) ** 2].view(
        *batch, 70, 70
    )
    factor = damped_cholesky(a.mT.float(), 0.5, precision=precision)
    one = damped_cholesky(a.view(-1, 70, 70)[0].float(), 0.5, precision=precision)
    assert torch.equal(factor.factor.view(-1, 70, 70)[0].triu(), one.factor.triu())
    for columns in ((), (3,)):
        b = torch.randn(*batch, 70, *columns, dtype=wide)
        solution = factor.solve_refined(b)
        eye = torch.eye(70, dtype=wide)
        # The factor's A is the float32 copy's.
        truth = torch.linalg.solve(a.float().double() + 0.5 * eye, b if columns else b[..., None])
        assert solution.x.shape == b.shape and solution.residual <= 1e-12
        torch.testing.assert_close(solution.x, truth.reshape(b.shape), rtol=1e-10, atol=1e-10)
        near = factor.solve(b.float())
        assert near.dtype == torch.float32
        assert float((near - truth.reshape(b.shape)).norm() / truth.norm()) <= 0.02


@every_precision
def test_float64_is_solved_by_a_float32_factor(path, precision):
    a, b = matrix("condition 1e2", 100), torch.randn(100, dtype=wide)
    factor = damped_cholesky(a, 1e-1, precision=precision)
    assert factor.factor.dtype == torch.float32 and factor.solve(b).dtype == wide
    solution = factor.solve_refined(b)
    truth = torch.linalg.solve(damped(a, 1e-1), b)
    assert float((solution.x - truth).norm() / truth.norm()) <= 1e-12 * 20
    assert factor.with_damping(0.2).precision == precision
    torch.testing.assert_close(
        factor.logdet().double(), damped(a, 1e-1).logdet(), rtol=0, atol=100 * 2.0**-8
    )
    assert 5 <= float(factor.condition()) <= 12


@every_precision
def test_the_default_device_may_be_another(path, precision):
    a, b = matrix("condition 1e2", 100).float(), torch.randn(100, dtype=wide)
    expected = damped_cholesky(a, 0.1, precision=precision).solve_refined(b)
    with torch.device("meta"):
        found = damped_cholesky(a, 0.1, precision=precision).solve_refined(b)
    assert torch.equal(found.x, expected.x)


@every_precision
def test_in_place(path, precision):
    a = torch.stack([matrix("condition 1e2", 100).float()] * 2)
    expected = damped_cholesky(a, 0.1, precision=precision)
    memory = a.data_ptr()
    factor = damped_cholesky(a, 0.1, overwrite=True, precision=precision)
    assert factor.factor.data_ptr() == memory and factor.matrix is None
    assert torch.equal(factor.factor.triu(), expected.factor.triu())
    with pytest.raises(InputError, match="overwrite=True did away with A"):
        factor.solve_refined(torch.randn(2, 100))
    with pytest.raises(SingularMatrixError, match=f"in {precision} or not finite.*overwrite=False"):
        damped_cholesky(-torch.eye(100), 0.5, overwrite=True, precision=precision)


def test_small_orders_and_unknown_precisions(path):
    a = matrix("condition 1e2", BLOCK).float()
    factor = damped_cholesky(a, 0.1, precision="bf16")
    assert factor.precision == "ieee"
    assert torch.equal(factor.factor.triu(), damped_cholesky(a, 0.1).factor.triu())
    assert damped_cholesky(matrix("graded", 100), 0.1).precision == "ieee"
    with pytest.raises(InputError, match="precision='fp8' is unknown.*ieee, tf32, bf16"):
        damped_cholesky(a, 0.1, precision="fp8")


# Where it does not exist


@every_precision
@pytest.mark.parametrize("dtype", [torch.float32, wide], ids=str)
def test_a_factor_that_does_not_exist_is_made_in_the_matrixs_dtype(path, caplog, precision, dtype):
    a = matrix("condition 1e8", 160).to(dtype)
    damping = 1e-6 * float(torch.linalg.matrix_norm(a, 2))
    with caplog.at_level(logging.WARNING):
        factor = damped_cholesky(a, damping, precision=precision)
    assert (factor.precision, factor.factor.dtype) == ("ieee", dtype)
    assert f"no Cholesky factor in {precision}, so it is factored in {dtype}" in caplog.text
    assert float(backward_error(factor, a).norm()) <= 168 * torch.finfo(dtype).eps * float(
        a.trace()
    )
    unchecked = damped_cholesky(a, damping, precision=precision, check=False)
    assert unchecked.precision == precision
    assert bool(unchecked.solve(torch.ones(160, dtype=dtype)).isnan().all())


@every_precision
def test_failures_are_those_of_every_factor(path, precision):
    a = torch.stack([matrix("condition 1e1", 100).float()] * 3)
    a[1, 70, 70] = -9.0
    with pytest.raises(SingularMatrixError, match="matrix 1 of 3.*pivot 71 of 100") as info:
        damped_cholesky(a, 0.5, precision=precision)
    factor = damped_cholesky(a, 0.5, precision=precision, max_escalations=2)
    assert factor.damping == 50.0 and factor.precision == precision
    damped_cholesky(a, info.value.smallest_damping, precision=precision)
    status = low_precision.factor(a, 0.5, False, precision, factor_plain)[1]
    assert status.tolist() == [0, 71, 0]
    for i, j in ((0, 99), (40, 41), (99, 99)):
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = a[[0, 0]].clone()
            bad[1, i, j] = bad[1, j, i] = value
            with pytest.raises(InputError, match="A is not finite"):
                damped_cholesky(bad, 0.5, precision=precision)
            x = damped_cholesky(bad, 0.5, precision=precision, check=False).solve(
                torch.ones(2, 100)
            )
            assert x.isnan().all(1).tolist() == [False, True] and bool(x[0].isfinite().all())


class ReadsNothing(TorchDispatchMode):
    """Raises at what would wait for a device."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        index = [i for i in (args[1] if name.startswith("index") else []) if i is not None]
        if name in self.waits or any(i.dtype == torch.bool for i in index):
            raise AssertionError(f"{name} waits")
        return func(*args, **(kwargs or {}))


@every_precision
def test_an_unchecked_factor_reads_nothing_back(path, precision):
    a, b = matrix("condition 1e2", 100).float(), torch.randn(100)
    with ReadsNothing():
        x = damped_cholesky(a, 0.1, check=False, precision=precision).solve(b)
        with pytest.raises(AssertionError, match="waits"):
            damped_cholesky(a, 0.1, precision=precision)
    assert torch.equal(x, damped_cholesky(a, 0.1, precision=precision).solve(b))


# Refinement


@every_precision
@every_kind
@pytest.mark.parametrize("order", ORDERS)
def test_refined_solutions_are_float64s(path, kind, order, precision):
    a = matrix(kind, order).float()
    # Half of lam is the error at most: 22 iterations by the module's count, and rounding's.
    damping = 2 * sufficient(a, precision)
    b = torch.randn(order, 4, dtype=wide)
    b[:, 1] = 0
    b[:, 2] *= 1e-30
    factor = damped_cholesky(a, damping, precision=precision)
    solution = factor.solve_refined(b)
    residual = (damped(a, damping) @ solution.x - b).norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)
    assert solution.residual <= 1e-12 and float(residual.max()) <= 1e-12
    assert not solution.x[:, 1].any()
    assert 0 < solution.iterations <= 3 * 24
    condition = float(torch.linalg.cond(damped(a, damping)))
    truth = torch.linalg.solve(damped(a, damping), b)
    error = (solution.x - truth).norm(dim=0)[[0, 2, 3]] / truth.norm(dim=0)[[0, 2, 3]]
    assert float(error.max()) <= 2e-12 * condition


@every_precision
@pytest.mark.parametrize("exponent", [2, 4, 6, 8])
def test_with_little_damping_it_is_reached_or_said(path, caplog, exponent, precision):
    """Where the bound promises nothing."""
    a, b = matrix(f"condition 1e{exponent}", 160), torch.randn(160, dtype=wide)
    damping = 0.1**exponent * float(torch.linalg.matrix_norm(a, 2))
    with caplog.at_level(logging.WARNING):
        factor = damped_cholesky(a, damping, precision=precision)
        solution = factor.solve_refined(b)
    residual = float((damped(a, damping) @ solution.x - b).norm() / b.norm())
    # Rounding of the product that each computes, with solutions up to 1 / lam long.
    rounding = 160 * torch.finfo(wide).eps * 10**exponent
    assert residual == pytest.approx(solution.residual, abs=rounding)
    assert (solution.residual <= 1e-12) or "refinement stopped at" in caplog.text
    assert solution.residual <= max(1e-12, rounding)


@every_precision
def test_refinement_says_when_it_stalls(path, caplog, precision):
    factor = damped_cholesky(matrix("condition 1e4", 100).float(), 0.1, precision=precision)
    solution = factor.solve_refined(torch.randn(100), tolerance=1e-300)
    assert 1e-300 < solution.residual <= 1e-12 and "refinement stopped at" in caplog.text
    assert factor.solve_refined(torch.zeros(100)).residual == 0.0
    assert factor.solve_refined(torch.zeros(100, 0)).x.shape == (100, 0)


# CUDA's calls, by the stand-in


class Settings(TorchDispatchMode):
    """What torch's setting was at each product and triangular solve."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("addmm_", "linalg_solve_triangular"):
            self.seen.add((name, float32_products()))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(value):
    before = float32_products()
    ask_float32_products(value)
    try:
        yield
    finally:
        ask_float32_products(before)


@every_precision
@pytest.mark.parametrize("path", ["cuda"], indirect=True)
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_is_for_the_products_alone_and_put_back(path, monkeypatch, precision, before):
    a = matrix("condition 1e1", 100).float()
    with setting(before), Settings() as mode:
        before = float32_products()
        damped_cholesky(a, 0.1, precision=precision)
        assert float32_products() == before
    products = {("addmm_", "tf32")} if precision == "tf32" else set()
    # Before 2.9 torch's setting is on or off, and off reads as none.
    exact = "ieee" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "none"
    assert mode.seen == {("linalg_solve_triangular", exact), *products}

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.Tensor, "addmm_", fails)
    monkeypatch.setattr(low_precision, "_multiply_bf16", fails)
    with setting(before):
        before = float32_products()
        with pytest.raises(RuntimeError, match="out of memory"):
            damped_cholesky(a, 0.1, precision=precision)
        assert float32_products() == before


@every_precision
def test_on_the_cpu_no_setting_is_touched(precision):
    with setting("tf32"), Settings() as mode:
        damped_cholesky(matrix("condition 1e1", 100).float(), 0.1, precision=precision)
    assert mode.seen == {("linalg_solve_triangular", "tf32"), ("addmm_", "tf32")}


@every_precision
@pytest.mark.parametrize("path", ["cuda"], indirect=True)
def test_matrix_units_and_emulation_multiply_the_same_numbers(path, monkeypatch, precision):
    a = matrix("condition 1e2", 160).float()
    found = damped_cholesky(a, 0.1, precision=precision)
    monkeypatch.setattr(low_precision, "_on_matrix_units", lambda tensor: False)
    emulated = damped_cholesky(a, 0.1, precision=precision)
    difference = backward_error(found, a) - backward_error(emulated, a)
    assert float(difference.norm()) <= 2 * bound(a, 0.1, precision)


@every_precision
def test_the_certificate_is_of_a_as_it_is(path, precision):
    a = matrix("condition 1e2", 150).float()
    a = a + 1e-6 * float(a.abs().max()) * torch.randn_like(a).tril(-1)
    b = torch.randn(150, 2)
    factor = damped_cholesky(a, 0.2 * float(a.diagonal().max()), precision=precision)
    assert factor.precision == precision
    solution = factor.solve_refined(b)
    true = damped(a.double(), factor.damping) @ solution.x - b.double()
    assert float((true.norm(dim=0) / b.norm(dim=0)).max()) <= 2 * solution.residual + 1e-14


@every_precision
def test_right_hand_sides_have_the_matrixs_dtype_and_any_size(path, precision):
    """A float64 A has a float32 factor, out of whose range b may lie."""
    a = matrix("condition 1e2", 150)
    factor = damped_cholesky(a, float(a.diagonal().max()), precision=precision)
    assert factor.precision == precision and factor.factor.dtype == torch.float32
    with pytest.raises(InputError, match="b is torch.float32, A is torch.float64"):
        factor.solve(torch.ones(150))
    b = torch.randn(150, 3, dtype=torch.float64)
    sizes = torch.tensor([1e-100, 1.0, 1e100], dtype=torch.float64)
    torch.testing.assert_close(factor.solve(b * sizes), factor.solve(b) * sizes, rtol=1e-5, atol=0)


def test_factorisations_in_two_threads_leave_the_setting_alone(path, monkeypatch):
    monkeypatch.setattr(low_precision, "_on_matrix_units", lambda tensor: True)
    a = matrix("condition 1e2", 150).float()
    damping, before = float(a.diagonal().max()), float32_products()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: damped_cholesky(a, damping, precision="tf32"), range(20)))
    finally:
        sys.setswitchinterval(interval)
    assert float32_products() == before
