"""Every curvature with a matrix against that matrix, dense and in float64, on every case."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import CASES, IDS

import imu_fast as imu
from imu_fast import reference
from imu_fast.curvature.kfac import fit_kfac
from imu_fast.factors.probabilities import probabilities
from imu_fast.solvers.conjugate_gradient import conjugate_gradient

OF_THE_GGN = {
    "ggn": reference.ggn_matrix,
    "ggn_block": reference.ggn_block_matrix,
    "kfac": reference.kfac_matrix,
}


def make(case, dtype):
    p = case.make(dtype)
    return imu.GradientFactors.from_head(p.act, p.weight, p.bias, p.labels, p.offsets)


def gradients(f):
    return reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias).flatten(1)


def dense(name, f, damping, fitted=None):
    p, scale = probabilities(f)
    if name in OF_THE_GGN:
        return OF_THE_GGN[name](p, scale, f.act, f.n, damping, f.has_bias)
    if name == "fisher":
        g = gradients(f)
        return g.T @ g / f.n + damping * torch.eye(g.shape[1], dtype=torch.float64)
    # K-FAC's eigenbasis is not unique where eigenvalues coincide: the fitted one is taken.
    q = torch.kron(fitted.basis_out, fitted.basis_in)
    return reference.ekfac_matrix(p, scale, f.act, f.n, damping, f.has_bias, q)


def check(name, f, damping, v, **options):
    fitted = imu.fit(name, f, damping=damping, **options)
    matrix = dense(name, f, damping, fitted)
    x, rhs = fitted.solve(v.double()), v.double().flatten()
    truth = torch.linalg.solve(matrix, rhs).view_as(x)
    # The dense solve rounds by P eps cond; the entries p - p^2 of both matrices by eps, not by
    # eps (p - p^2), which near saturation is far more.
    condition = float(torch.linalg.cond(matrix))
    entries = f.num_classes * (float(f.act.square().sum(dim=1).max()) + 1) / damping
    rounding = 2.3e-16 * (len(matrix) * condition + entries)
    true = float((matrix @ x.flatten() - rhs).norm() / rhs.norm())
    assert true <= 2 * fitted.residual + rounding, "the certificate understates the residual"
    error = float((x - truth).norm() / truth.norm())
    assert error <= (fitted.residual + 1e-13) * condition + rounding
    return fitted, error


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("name", ["ggn_block", "kfac", "ekfac"])
@pytest.mark.parametrize("damping", [1e-1, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_on_every_case(case, name, damping, dtype):
    f = make(case, dtype)
    fitted, _ = check(name, f, damping, torch.randn(case.classes, f.width, dtype=dtype))
    assert fitted.residual <= 1e-9


@pytest.mark.parametrize(
    "name, options",
    [
        ("ggn", {"solver": "primal"}),
        ("ggn", {"solver": "dual"}),
        ("ggn", {"solver": "cg"}),
        ("fisher", {}),
        ("ggn_block", {}),
        ("kfac", {}),
        ("ekfac", {}),
    ],
    ids=str,
)
def test_condition_up_to_1e8(name, options):
    """Features whose scales span four orders of magnitude, so that their squares span eight."""
    n, d, classes = 40, 6, 4
    act = torch.randn(n, d, dtype=torch.float64) * torch.logspace(0, -4, d, dtype=torch.float64)
    weight = torch.randn(classes, d, dtype=torch.float64)
    labels = torch.arange(n) % classes
    f = imu.GradientFactors.from_head(act.float(), weight.float(), None, labels)
    v = f.mean_gradient()
    for tolerance in (1e-6, 1e-12):
        # A forward error of `tolerance` needs a residual below it by the condition number.
        extra = {"tolerance": tolerance / 1e2} if name in ("ggn", "fisher") else {}
        fitted, _ = check(name, f, 1e-9, v, **options, **extra)
        assert fitted.residual <= tolerance


@pytest.mark.parametrize("preconditioner", ["none", "kfac", "nystrom"])
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[6], CASES[7]], ids=lambda c: c.why)
def test_preconditioned_conjugate_gradient(preconditioner, case, monkeypatch):
    module = sys.modules["imu_fast.curvature.ggn.iterative"]
    # K-FAC from the first iteration: these problems are solved before it would pay.
    monkeypatch.setattr(module, "kfac_cost", lambda *_: -1e9)
    monkeypatch.setattr(module, "_FIRST_GUESS", 0)
    made = []
    monkeypatch.setattr(module, "fit_kfac", lambda *args: made.append(1) or fit_kfac(*args))
    f = make(case, torch.float32)
    v = torch.randn(case.classes, f.width)
    options = dict(solver="cg", preconditioner=preconditioner, tolerance=1e-9)
    fitted, _ = check("ggn", f, 1e-3, v, **options)
    assert fitted.residual <= 1e-9
    assert len(made) == (preconditioner == "kfac")


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_chunks_of_tokens_change_nothing(name, monkeypatch):
    f = make(CASES[1], torch.float64)
    expected = imu.fit(name, f, damping=0.1).damped
    for limit, value in (("_PIECE_ROWS", 3), ("_PIECE_ELEMENTS", 0), ("_STRIP", 2)):
        monkeypatch.setattr(sys.modules["imu_fast.ops.symmetric"], limit, value)
    torch.testing.assert_close(imu.fit(name, f, damping=0.1).damped, expected)


@pytest.mark.parametrize("damping, expected", [(1.0, 0), (1e-4, 1)])
def test_kfac_is_made_where_the_first_iterations_say_that_it_pays(damping, expected, monkeypatch):
    """Features with a large mean are slow at a small damping; at a large one nothing is."""
    made, module = [], sys.modules["imu_fast.curvature.ggn.iterative"]
    monkeypatch.setattr(module, "fit_kfac", lambda *args: made.append(1) or fit_kfac(*args))
    weight = torch.randn(20, 40) / 6
    f = imu.GradientFactors.from_head(
        torch.rand(400, 40) + 1, weight, None, torch.randint(20, (400,))
    )
    fitted = imu.fit("ggn", f, damping=damping, solver="cg")
    fitted.solve(f.mean_gradient())
    assert fitted.residual <= fitted.tolerance
    assert len(made) == expected


def test_conjugate_gradient_gives_up_where_it_is_told_to():
    matrix = torch.diag(torch.arange(1.0, 31.0))
    asked = []

    def give_up(iterations, ahead):
        asked.append(ahead)
        return iterations == 4

    v = torch.ones(1, 30)
    options = dict(tolerance=1e-6, max_iterations=50)
    x, products = conjugate_gradient(lambda p: p @ matrix, v, give_up=give_up, **options)
    assert products == 4 and len(asked) == 5
    # What is ahead is what the residual has to be reduced by.
    true = float((v - x @ matrix).norm() / v.norm())
    assert true / 1e-6 == pytest.approx(asked[-1], rel=1e-3)


def test_blocks_made_slab_by_slab(monkeypatch):
    f = make(CASES[7], torch.float64)
    v = torch.randn(f.num_classes, f.width, dtype=torch.float64)
    whole = imu.fit("ggn_block", f, damping=1e-2)
    expected, own = whole.solve(v), whole.self_influence(f)
    monkeypatch.setattr(
        sys.modules["imu_fast.curvature.ggn_block"], "_BLOCK_ELEMENTS", 2 * f.width**2
    )
    slabs = imu.fit("ggn_block", f, damping=1e-2)
    for _ in range(2):
        torch.testing.assert_close(slabs.solve(v), expected)
        torch.testing.assert_close(slabs.self_influence(f), own)
