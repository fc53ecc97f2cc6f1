"""The damped Cholesky solve: both paths against a float64 solve, and its errors."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.solvers.cholesky import cusolver
from imu_fast.solvers.cholesky import lapack as lapack_module
from imu_fast.solvers.cholesky.cholesky import damped_cholesky


@pytest.fixture(params=["extension", "torch", "cuda", "torch on cuda", "cuda's routes on cpu"])
def path(request, monkeypatch):
    """Each implementation, by the name that a factor gives it; tensors are made on its device."""
    backends, device = imu.backends(), "cuda" if request.param.endswith("cuda") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (
        request.param in ("extension", "cuda's routes on cpu")
        and not backends["extension"].available
    ):
        pytest.skip(backends["extension"].reason)
    if request.param == "cuda" and not backends["cuda"].available:
        pytest.skip(backends["cuda"].reason)
    if request.param.startswith("torch"):
        monkeypatch.setattr(lapack_module, "extension", lambda: None)
        monkeypatch.setattr(cusolver, "can_factor", lambda a: False)
    elif request.param == "cuda's routes on cpu":
        import cuda_stand_in

        cuda_stand_in.install(monkeypatch)
    with torch.device(device):
        yield request.param.split("'")[0].split(" ")[0]


@pytest.fixture(params=["torch", "scipy"])
def lapack(request, monkeypatch):
    """Each library that LAPACK may come from."""
    if not imu.backends()["extension"].available:
        pytest.skip(imu.backends()["extension"].reason)
    try:
        found = getattr(lapack_module, f"_{request.param}_lapack")()
    except (OSError, AttributeError, ImportError) as error:
        pytest.skip(f"no LAPACK in {request.param}: {error}")
    from imu_fast import _C

    monkeypatch.setattr(lapack_module, "extension", lambda: (_C, found))
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


def test_the_default_device_may_be_another(path):
    a, b = spd(40, (2,)), torch.randn(2, 40, dtype=torch.float64)
    expected = imu.damped_cholesky_solve(a, b, 0.5)
    with torch.device("meta"):
        assert torch.equal(imu.damped_cholesky_solve(a, b, 0.5), expected)
        found = damped_cholesky(a, 0.5).solve_refined(b)
    torch.testing.assert_close(found.x, expected)


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


def test_bad_input(path):
    a, b = spd(4), torch.randn(4, dtype=torch.float64)
    solve = imu.damped_cholesky_solve
    for damping in (-1, float("nan"), float("inf"), "1", True):
        with pytest.raises(InputError, match="damping="):
            solve(a, b, damping)
        with pytest.raises(InputError, match="damping="):
            damped_cholesky(a, damping)
    with pytest.raises(InputError, match=r"damping=0 must be finite and > 0"):
        damped_cholesky(a, 0)
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


@pytest.mark.parametrize("order", [5, 129, 600])
def test_in_place(path, order):
    a = spd(order, (2,))
    damped = a + torch.eye(order)
    memory, b = a.data_ptr(), torch.randn(2, order, dtype=torch.float64)
    factor = damped_cholesky(a, 1.0, overwrite=True)
    assert factor.factor.data_ptr() == memory and factor.matrix is None
    torch.testing.assert_close((damped @ factor.solve(b)[..., None]).squeeze(-1), b)
    with pytest.raises(InputError, match="overwrite=True did away with A"):
        factor.with_damping(2.0)
    with pytest.raises(InputError, match="overwrite=True did away with A"):
        factor.solve_refined(b)
    with pytest.raises(SingularMatrixError, match="pivot 1 of 3.*overwrite=False"):
        damped_cholesky(-torch.eye(3), 0.5, overwrite=True)


def test_a_sweep_of_dampings(path):
    a, b = spd(30, (2,)), torch.randn(2, 30, dtype=torch.float64)
    factor = damped_cholesky(a, 1.0)
    for damping in (1e-1, 1e-3, 10.0):
        again = factor.with_damping(damping)
        assert again.damping == damping
        damped = a + damping * torch.eye(30)
        torch.testing.assert_close((damped @ again.solve(b)[..., None]).squeeze(-1), b)


def test_escalation_is_capped_and_reported(path, caplog):
    a = torch.diag(torch.tensor([1.0, -0.5, 2.0]))
    with pytest.raises(SingularMatrixError, match=r"A \+ 0.1 I"):
        damped_cholesky(a, 1e-3, max_escalations=2)
    assert not caplog.records
    factor = damped_cholesky(a, 1e-3, max_escalations=3)
    assert factor.damping == pytest.approx(1.0)
    assert "escalated from 0.001 to 1" in caplog.text
    with pytest.raises(InputError, match="max_escalations=0"):
        damped_cholesky(a, 1e-3, max_escalations=3, overwrite=True)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_condition_estimate(path, condition):
    q, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), 40, dtype=torch.float64)
    a = q @ torch.diag(values) @ q.T
    factor = damped_cholesky((a + a.T) / 2, 1e-12)
    estimate = float(factor.condition())
    assert condition / 2 <= estimate <= condition * 1.01
    batch = damped_cholesky(
        torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1, 99]))]), 1.0
    )
    torch.testing.assert_close(batch.condition(), torch.tensor([1.0, 50.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("columns", [(), (1,), (4,)], ids=str)
def test_refinement_reaches_float64_from_a_float32_factor(path, batch, columns):
    a = spd(20, batch, torch.float32, rank=5)
    b = torch.randn(*batch, 20, *columns, dtype=torch.float64)
    if columns == (4,):
        b[..., 0] = 0
    solution = damped_cholesky(a, 1e-3).solve_refined(b)
    assert solution.residual <= 1e-12 and solution.x.shape == b.shape
    damped = a.double() + 1e-3 * torch.eye(20, dtype=torch.float64)
    truth = torch.linalg.solve(damped, b if columns else b[..., None]).reshape(b.shape)
    assert float((solution.x - truth).norm() / truth.norm()) <= 1e-12 * 1e5


def test_refinement_says_when_it_stalls(path, caplog):
    a = torch.diag(torch.logspace(0, -9, 10)).roll(3, 0).roll(3, 1)
    q, _ = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))
    a = (q @ a.double() @ q.T).float()
    a = ((a + a.T) / 2).contiguous()
    factor = damped_cholesky(a, 1e-7, max_escalations=3)
    solution = factor.solve_refined(torch.randn(10), tolerance=1e-300)
    assert solution.residual > 1e-300 and "refinement stopped at" in caplog.text
    zero = factor.solve_refined(torch.zeros(10))
    assert zero.residual == 0.0 and not zero.x.any()


def test_the_certificate_is_of_each_right_hand_side_of_a_as_it_is(path):
    """Of sizes a norm would lose, and of an A that is not quite symmetric."""
    a = spd(20, (3,), torch.float64)
    a = a + 1e-6 * torch.randn_like(a).tril(-1)
    b = torch.randn(3, 20, 5, dtype=torch.float64)
    b *= torch.tensor([1e-200, 1e-30, 1.0, 1e30, 1e200], dtype=torch.float64)
    solution = damped_cholesky(a, 0.1).solve_refined(b)
    damped = a + 0.1 * torch.eye(20, dtype=torch.float64)
    # Scaled, so that the test's own norms neither underflow nor overflow.
    size = b.abs().amax(dim=-2, keepdim=True)
    error = (damped @ (solution.x / size) - b / size).norm(dim=-2) / (b / size).norm(dim=-2)
    assert float(error.max()) <= 2 * solution.residual + 1e-14
    assert solution.residual <= 1e-12


def test_refinement_names_a_right_hand_side_that_is_not_finite(path):
    factor, b = damped_cholesky(spd(5, (), torch.float32), 0.1), torch.ones(5)
    b[2] = torch.nan
    with pytest.raises(InputError, match="b is not finite"):
        factor.solve_refined(b)


def test_solutions_carry_no_gradient(path):
    """Where a gradient is not propagated none may be made up."""
    a = spd(6, (), torch.float64).requires_grad_()
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    factor = damped_cholesky(a, 0.1)
    assert not factor.solve(b).requires_grad and not factor.solve_refined(b).x.requires_grad


@pytest.mark.parametrize("order", [1, 5, 40, 129, 300])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_entry_that_is_not_finite_is_found(path, order, value):
    for i in range(0, order, max(1, order // 3)):
        for j in {i, order - 1}:
            a = spd(order, (2,), torch.float32)
            a[1, i, j] = a[1, j, i] = value
            with pytest.raises(InputError, match="A is not finite"):
                damped_cholesky(a, 1.0)


@pytest.mark.parametrize("order", [3, 30, 129, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
def test_unchecked_failures_are_nan_and_leave_the_others_alone(path, order, dtype, overwrite):
    a, b = spd(order, (4,), dtype), torch.randn(4, order, dtype=dtype)
    truth = imu.damped_cholesky_solve(a, b, 0.5)
    a[0, 1, 1] = -9.0
    a[2, 0, 2] = a[2, 2, 0] = torch.inf
    factor = damped_cholesky(a.clone(), 0.5, overwrite=overwrite, check=False)
    for x in (factor.solve(b), imu.damped_cholesky_solve(a, b, 0.5, check=False)):
        assert bool(x[[0, 2]].isnan().all())
        torch.testing.assert_close(x[[1, 3]], truth[[1, 3]])
    assert factor.logdet().isnan().tolist() == [True, False, True, False]
    with pytest.raises(InputError, match="A is not finite"):
        imu.damped_cholesky_solve(a, b, 0.5)
    a[2] = a[1]
    with pytest.raises(SingularMatrixError, match="pivot 2 of"):
        imu.damped_cholesky_solve(a, b, 0.5)
    # Even with nothing to solve.
    with pytest.raises(SingularMatrixError, match="pivot 2 of"):
        imu.damped_cholesky_solve(a, b.new_empty(4, order, 0), 0.5)
    with pytest.raises(InputError, match="max_escalations=0"):
        damped_cholesky(a, 0.5, check=False, max_escalations=1)


def hard_matrix(kind, order):
    """A float64 matrix, and a damping that leaves it a condition number of at most 1e8."""
    if kind == "one class":  # p - p^2 is zero
        return torch.zeros(order, order, dtype=torch.float64), 1e-2
    if kind == "rank-deficient":
        return spd(order, rank=3), 1e-2
    if kind == "duplicated samples":
        half = torch.randn(order // 2, 2 * order, dtype=torch.float64)
        rows = half.repeat_interleave(2, dim=0)
        return rows @ rows.mT / order, 1e-2
    exponent = {"well-conditioned": 1, "condition 1e4": 4, "condition 1e8": 8}[kind]
    q, _ = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64))
    a = q * torch.logspace(0, -exponent, order, dtype=torch.float64) @ q.mT
    return (a + a.mT) / 2, 0.1**exponent


@pytest.mark.parametrize(
    "kind",
    [
        *("well-conditioned", "condition 1e4", "condition 1e8"),
        *("rank-deficient", "duplicated samples", "one class"),
    ],
)
@pytest.mark.parametrize("order", [40, 600])
def test_relative_error(path, kind, order):
    a, damping = hard_matrix(kind, order)
    a = a.float()
    b, eye = torch.randn(order), torch.eye(order, dtype=torch.float64)
    truth = torch.linalg.solve(a.double() + damping * eye, b.double())
    condition = float(torch.linalg.cond(a.double() + damping * eye))

    def error(x):
        return float((x.double() - truth).norm() / truth.norm())

    if kind == "condition 1e8":
        # Beyond 1 / eps of float32: the factor has to be float64.
        factor = damped_cholesky(a.double(), damping)
    else:
        factor = damped_cholesky(a, damping)
        eps = torch.finfo(torch.float32).eps
        assert error(factor.solve(b)) <= max(1e-5, eps * condition)
    refined = factor.solve_refined(b, tolerance=1e-15).x
    assert error(refined) <= max(1e-12, torch.finfo(torch.float64).eps * condition)
