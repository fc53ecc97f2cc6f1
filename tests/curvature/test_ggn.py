"""The exact curvature against a dense float64 solve, and its certificate."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, LargestTensor, Pieces

import imu_fast as imu
from imu_fast import reference
from imu_fast.curvature.ggn import dense as ggn_dense
from imu_fast.curvature.ggn import ggn, iterative
from imu_fast.curvature.ggn.costs import choose_preconditioner, choose_solver
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.factors.probabilities import augmented, probabilities
from imu_fast.solvers.conjugate_gradient import refine


def dense(factors, damping):
    p, scale = probabilities(factors)
    return reference.ggn_matrix(p, scale, factors.act, factors.n, damping, factors.has_bias)


def make(case, dtype):
    p = case.make(dtype)
    return imu.GradientFactors.from_head(p.act, p.weight, p.bias, p.labels, p.offsets)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("damping", [1e-1, 1e-4])
@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_on_every_case(case, damping, solver, dtype):
    factors = make(case, dtype)
    matrix = dense(factors, damping)
    v = torch.randn(case.classes, factors.width, dtype=dtype)
    fitted = imu.fit("ggn", factors, damping=damping, solver=solver, tolerance=1e-9)
    x = fitted.solve(v.double())
    true = float((matrix @ x.flatten() - v.double().flatten()).norm() / v.double().norm())
    assert fitted.residual <= 1e-9
    condition = float(torch.linalg.cond(matrix))
    # Rounding of the dense float64 product M x itself: P eps ||M|| ||x||, at most P eps cond ||v||.
    assert true <= 2 * fitted.residual + len(matrix) * 2.2e-16 * condition
    truth = torch.linalg.solve(matrix, v.double().flatten()).view_as(x)
    assert float((x - truth).norm() / truth.norm()) <= 2e-9 * condition


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[8]], ids=lambda c: c.why)
@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
@pytest.mark.parametrize("preconditioner", ["none", "kfac", "nystrom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_solver_on_pieces(case, solver, preconditioner, dtype, monkeypatch):
    monkeypatch.setattr(iterative, "kfac_cost", lambda *_: -1e9)  # K-FAC from the start
    monkeypatch.setattr(iterative, "_FIRST_GUESS", 0)
    f = make(case, dtype)
    spec = imu.GGN(damping=1e-2, solver=solver, preconditioner=preconditioner, tolerance=1e-9)
    fitted = imu.fit(spec, Pieces(f, 3))
    truth = dense(f, 1e-2)
    v = torch.randn(2, case.classes, f.width, dtype=dtype)
    x = fitted.solve(v.double())
    assert fitted.residual <= 1e-9
    bound = 2e-9 * float(torch.linalg.cond(truth))
    for one, rhs in zip(x, v, strict=True):
        expected = torch.linalg.solve(truth, rhs.double().flatten()).view_as(one)
        assert float((one - expected).norm() / expected.norm()) <= bound
    many = torch.randn(40, case.classes, f.width, dtype=dtype)  # by the float64 factor's bound
    expected = torch.linalg.solve(truth, many.double().flatten(1).T).T.view(many.shape)
    assert float((fitted.solve(many.double()) - expected).norm() / expected.norm()) <= bound


def test_a_zero_right_hand_side_and_a_missed_tolerance(caplog):
    factors = make(CASES[1], torch.float32)
    fitted = imu.fit("ggn", factors, damping=0.1)
    assert not fitted.solve(torch.zeros(7, 6)).any()
    assert fitted.residual == 0.0
    fitted = imu.fit("ggn", factors, damping=1e-6, tolerance=1e-30)
    fitted.solve(torch.randn(7, 6))
    assert fitted.residual > 1e-30
    assert "above the tolerance" in caplog.text


def test_refinement_stops_where_nothing_is_gained():
    v = torch.ones(1, 3)
    useless = refine(lambda x: x, [lambda r, _: (torch.zeros_like(r), 1)], v, tolerance=1e-6)
    assert (useless.residual, useless.iterations) == (1.0, 1)
    worse = refine(lambda x: x, [lambda r, _: (5 * r, 1)], v, tolerance=1e-6)
    assert worse.residual == 1.0 and not worse.x.any()


@pytest.mark.parametrize("build", [ggn_dense._by_strips, ggn_dense._by_pairs, ggn_dense._whole])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_way_to_the_dense_matrix(build, case, monkeypatch):
    """Of the GGN between contrasts of the classes, in chunks and strips that do not divide."""
    monkeypatch.setattr(ggn_dense, "_STRIP_ELEMENTS", 500)
    monkeypatch.setattr(ggn_dense, "_WHOLE_ELEMENTS", 200)
    monkeypatch.setattr(ggn_dense, "_WHOLE_STRIP", 7)
    monkeypatch.setattr(ggn_dense, "_STRIP", 3)
    factors = make(case, torch.float64)
    p, scale = probabilities(factors)
    a = augmented(factors.act, factors.has_bias)
    basis = ggn_dense.contrasts(case.classes)
    eye = torch.eye(case.classes - 1, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-14)
    rotation = torch.kron(basis, torch.eye(factors.width, dtype=torch.float64))
    truth = rotation.T @ dense(factors, 0.0) @ rotation
    found = build(p, scale / factors.n, a, basis)
    size = float((scale / factors.n * a.square().sum(dim=1)).sum())
    eps = torch.finfo(torch.float64).eps
    bound = (len(a) + 4 * case.classes) * eps * size
    assert found.shape == truth.shape  # of one class: nothing
    assert bool(((found - truth).triu().abs() <= bound).all())


def test_the_way_to_the_dense_matrix_follows_its_shape():
    assert ggn_dense._route(2000, 9, 129) is ggn_dense._by_strips
    assert ggn_dense._route(2000, 99, 65) is ggn_dense._by_pairs
    assert ggn_dense._route(50, 9, 33) is ggn_dense._whole
    assert ggn_dense._route(2000, 999, 3) is ggn_dense._whole


def test_a_damping_below_float32s_rounding_is_still_solved():
    """Float32 eigenvalues of K-FAC would be noise there."""
    generator = torch.Generator().manual_seed(1)
    act = torch.randn(400, 24, generator=generator) + 0.5
    weight = torch.randn(12, 24, generator=generator) / 5
    labels = torch.randint(12, (400,), generator=generator)
    factors = imu.GradientFactors.from_head(act, weight, None, labels)
    fitted = imu.fit("ggn", factors, damping=1e-9, solver="cg", preconditioner="kfac")
    fitted.solve(factors.mean_gradient())
    assert fitted.residual <= fitted.tolerance and fitted.iterations <= 200


def test_no_tokens_and_right_hand_sides_that_are_not_finite():
    labels = torch.full((3,), -100)
    empty = imu.GradientFactors.from_head(torch.randn(3, 4), torch.randn(5, 4), None, labels)
    v = torch.randn(5, 4)
    for solver in ("auto", "cg", "primal", "dual"):
        fitted = imu.fit("ggn", empty, damping=0.5, solver=solver, preconditioner="kfac")
        torch.testing.assert_close(fitted.solve(v), v / 0.5)
    with pytest.raises(InputError, match="v is not finite"):
        imu.fit("ggn", make(CASES[1], torch.float32), damping=0.5).solve(
            torch.full((7, 6), torch.inf)
        )


def test_a_matrix_that_is_indefinite_in_float64_says_what_to_do():
    act = torch.ones(4, 3) * 1e9
    factors = imu.GradientFactors.from_head(
        act, torch.zeros(2, 3), None, torch.tensor([0, 1, 0, 1])
    )
    fitted = imu.fit("ggn", factors, damping=1e-6, solver="primal")
    with pytest.raises(SingularMatrixError, match="raise the damping, or take solver='cg'"):
        fitted.solve(torch.randn(2, 3))


def test_cost_model():
    assert choose_solver(tokens=1000, classes=2, width=5) == "primal"
    assert choose_solver(tokens=2000, classes=100, width=513) == "cg"
    # Fewer FLOPs by conjugate gradient, but more of its small operations.
    assert choose_solver(tokens=130, classes=10, width=33) == "primal"
    # One product of order P against N P^2 for the matrix: many solves repay it.
    assert choose_solver(tokens=400, classes=10, width=65) == "cg"
    assert choose_solver(tokens=400, classes=10, width=65, solves=1000) == "primal"
    # The stiffer, the more iterations; the dense matrix takes what it takes.
    stiff = [choose_solver(364, 10, 157, 16, stiffness=s) for s in (1e4, 1e6)]
    assert stiff == ["cg", "primal"]
    # Few tokens of many features: N C is far below C D.
    assert choose_solver(tokens=20, classes=10, width=2049) == "dual"


@pytest.mark.parametrize("damping, made", [(1e-5, "primal"), (10.0, None)])
def test_auto_counts_on_more_iterations_of_a_stiff_system(damping, made):
    labels = torch.randint(10, (364,))
    factors = imu.GradientFactors.from_head(
        torch.randn(364, 156), 0.1 * torch.randn(10, 156), None, labels
    )
    fitted = imu.fit("ggn", factors, damping=damping, tolerance=1e-2)
    fitted.solve(torch.randn(16, 10, 156))
    assert fitted.direct.made == made


@pytest.mark.parametrize("tokens, left_for", [(8, "dual"), (400, "primal"), (8, None)])
@pytest.mark.parametrize("preconditioner", ["none", "kfac", "nystrom"])
def test_a_wrong_guess_is_corrected_by_the_first_iterations(
    tokens, left_for, preconditioner, monkeypatch
):
    """Of iterations that turn out too many: auto begins with them, and goes on with a factor."""
    monkeypatch.setattr(ggn, "choose_solver", lambda *_, **__: "cg")
    act, labels = torch.randn(tokens, 12).relu(), torch.arange(tokens) % 5
    f = imu.GradientFactors.from_head(act, 3 * torch.randn(5, 12), torch.zeros(5), labels)
    v = torch.randn(32, 5, 13, dtype=torch.float64)
    damping = 1e-6 if left_for else 100.0
    fitted = imu.fit("ggn", f, damping=damping, preconditioner=preconditioner)
    x = fitted.solve(v)
    assert fitted.direct.made == left_for and (fitted.iterations == 0) == bool(left_for)
    matrix = dense(f, damping)
    truth = torch.linalg.solve(matrix, v.flatten(1).T).T.view_as(v)
    assert float((x - truth).norm() / truth.norm()) < 1e-6 * float(torch.linalg.cond(matrix))
    asked = imu.fit("ggn", f, damping=damping, solver="cg", preconditioner=preconditioner)
    asked.solve(v)
    assert asked.direct.made is None and asked.iterations


def test_standing_still_at_first_is_no_reason_to_leave():
    """Where a factor takes the time of 9,000 iterations, as of 92 samples and 66 classes."""
    in_time = iterative._in_time(depth=1e6, most=9000)
    for iterations in (0, 8, 48, 400, 1000):
        assert not in_time(iterations, ahead=1e6)
    assert not in_time(400, ahead=1e2)  # two thirds of the way
    for iterations, ahead in ((1200, 1e6), (9000, 1e4)):
        with pytest.raises(iterative.DearerError):
            in_time(iterations, ahead)


def test_preconditioner_by_cost():
    assert choose_preconditioner(tokens=2000, classes=100, width=513) == "kfac"
    # Fewer samples than dimensions are where the rate is worst.
    assert choose_preconditioner(tokens=522, classes=10, width=513) == "kfac"
    # Its eigenvalues would cost more than the solve.
    assert choose_preconditioner(tokens=5000, classes=2, width=4096) == "none"
    # Fewer samples than features.
    assert choose_preconditioner(tokens=500, classes=10, width=513) == "none"


def test_bad_options():
    factors = make(CASES[1], torch.float32)
    with pytest.raises(InputError, match="solver='lu'"):
        imu.fit("ggn", factors, damping=0.1, solver="lu")
    with pytest.raises(InputError, match="tolerance=0"):
        imu.fit("ggn", factors, damping=0.1, tolerance=0)
    with pytest.raises(InputError, match="damping_mode='clamp' is unknown; choose one of add"):
        imu.fit("ggn", factors, damping=0.1, damping_mode="clamp")
    other = imu.GradientFactors(factors.delta, factors.act, factors.offsets, True)
    with pytest.raises(InputError, match="no curvature of the loss in their outputs"):
        imu.influence_scores(other, curvature="ggn")
    wide = imu.GradientFactors.from_head(
        torch.randn(2, 900), torch.randn(11, 900), None, torch.tensor([0, 1])
    )
    with pytest.raises(InputError, match="order 9000.*use 'cg'"):
        imu.fit("ggn", wide, damping=0.1, solver="primal")


def test_a_head_of_51_300_parameters_without_a_matrix_of_that_order():
    """A dense Hessian of it would take 10 GB: nothing beyond the features in float64 exists."""
    n, d, classes = 2000, 512, 100
    act, weight = torch.randn(n, d).relu(), torch.randn(classes, d) / d**0.5
    labels = torch.randint(classes, (n,))
    factors = imu.GradientFactors.from_head(act, weight, torch.zeros(classes), labels)
    v = factors.mean_gradient()
    with LargestTensor() as mode:
        fitted = imu.fit("ggn", factors, damping=1e-4)
        x = fitted.solve(v.double())
    assert mode.largest <= n * (d + 1)
    assert float((fitted.product(x) - v.double()).norm() / v.double().norm()) <= 1e-6
