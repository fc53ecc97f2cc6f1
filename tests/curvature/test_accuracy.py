"""Every exact solver against a dense float64 solve, on inputs that are hard each in its own way.

From float32 factors: a relative error of 1e-5, and of 1e-12 where that is asked for, or what the
rounding of a float64 matrix leaves possible; a certificate that understates no residual by over 2x.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import imu_fast as imu
from imu_fast import reference
from imu_fast.factors.probabilities import probabilities

N, D, CLASSES = 40, 6, 4
SOLVERS = [
    ("ggn", {"solver": "primal"}),
    ("ggn", {"solver": "dual"}),
    ("ggn", {"solver": "cg"}),
    ("fisher", {}),
    ("ggn_block", {}),
    ("kfac", {}),
    ("ekfac", {}),
]


def problem(kind):
    """Float32 factors, and a damping."""
    samples, classes, damping = N, CLASSES, 1e-1
    if kind == "rank-deficient":
        samples, damping = 3, 1e-3
    if kind == "one class":
        classes = 1
    act = torch.randn(samples, D)
    weight = torch.randn(classes, D)
    labels = torch.arange(samples) % classes
    if kind == "ill-conditioned":
        # Scales over four orders of magnitude, whose squares span eight.
        act *= torch.logspace(0, -4, D)
        damping = 1e-9
    elif kind == "duplicated samples":
        act[1::2] = act[::2]
        labels[1::2] = labels[::2]
        damping = 1e-3
    elif kind == "saturated softmax":
        weight *= 100
    elif kind == "one label":
        labels[:] = 2
    return imu.GradientFactors.from_head(act, weight, torch.randn(classes), labels), damping


KINDS = [
    "well-conditioned",
    "ill-conditioned",
    "rank-deficient",
    "duplicated samples",
    "saturated softmax",
    "one class",
    "one label",
]
DENSE = {
    "ggn": reference.ggn_matrix,
    "ggn_block": reference.ggn_block_matrix,
    "kfac": reference.kfac_matrix,
}


def dense(name, f, damping, fitted):
    p, scale = probabilities(f)
    if name in DENSE:
        return DENSE[name](p, scale, f.act, f.n, damping, f.has_bias)
    if name == "fisher":
        g = reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias).flatten(1)
        return g.T @ g / f.n + damping * torch.eye(g.shape[1], dtype=torch.float64)
    q = torch.kron(fitted.basis_out, fitted.basis_in)
    return reference.ekfac_matrix(p, scale, f.act, f.n, damping, f.has_bias, q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, options", SOLVERS, ids=str)
@pytest.mark.parametrize("goal", [1e-5, 1e-12])
def test_relative_error_and_certificate(kind, name, options, goal):
    f, damping = problem(kind)
    if name in ("ggn", "fisher"):
        # A relative error needs a residual below it by the condition number.
        condition = float(torch.linalg.cond(dense(name, f, damping, None)))
        options = {**options, "tolerance": max(goal / condition, 1e-14)}
    fitted = imu.fit(name, f, damping=damping, **options)
    v = torch.randn(f.num_classes, f.width)
    x = fitted.solve(v.double()).flatten()

    matrix, rhs = dense(name, f, damping, fitted), v.double().flatten()
    condition = float(torch.linalg.cond(matrix))
    assert condition >= 1e8 or kind != "ill-conditioned"
    # Rounding the matrix alone moves the solution, and any residual, by as much.
    floor = torch.finfo(torch.float64).eps * condition
    truth = torch.linalg.solve(matrix, rhs)
    assert float((x - truth).norm() / truth.norm()) <= max(goal, floor)
    # In extended precision, so that the residual of the test itself does not round.
    wide = matrix.numpy().astype(np.longdouble) @ x.numpy() - rhs.numpy()
    true = float(np.linalg.norm(wide.astype(np.float64)) / rhs.norm())
    assert true <= 2 * fitted.residual + floor, "the certificate understates the residual"


@pytest.mark.parametrize("kind", KINDS)
def test_many_right_hand_sides_and_their_bound(kind):
    f, damping = problem(kind)
    fitted = imu.fit("ggn", f, damping=damping, solver="primal")
    v = torch.randn(40, f.num_classes, f.width)
    x = fitted.solve(v.double())
    matrix, rhs = dense("ggn", f, damping, fitted), v.double().flatten(1)
    true = (x.flatten(1) @ matrix - rhs).norm(dim=1) / rhs.norm(dim=1)
    floor = torch.finfo(torch.float64).eps * float(torch.linalg.cond(matrix))
    assert x.shape == v.shape and fitted.residual <= fitted.tolerance
    assert float(true.max()) <= 2 * fitted.residual + floor


@pytest.mark.parametrize("kind", KINDS)
def test_self_influence_and_its_bound(kind):
    """One triangular solve for all samples: its residual is a bound, which must be one."""
    f, damping = problem(kind)
    fitted = imu.fit("ggn", f, damping=damping, solver="primal")
    values = fitted.self_influence(f).double()
    matrix = dense("ggn", f, damping, fitted)
    g = reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias).flatten(1)
    truth = (torch.linalg.solve(matrix, g.T).T * g).sum(dim=1)
    # Of the value by the residual: |g^T (x - M^-1 g)| <= residual |g|^2 / lam, and float32 out.
    slack = fitted.residual * g.square().sum(dim=1) / damping
    slack += 4 * torch.finfo(torch.float32).eps * truth.abs() + 1e-12
    assert bool(((values - truth).abs() <= slack).all())
    # The same solves, with their residuals recomputed: never above the bound.
    x = fitted.direct.primal(g.view(-1, f.num_classes, f.width)).flatten(1)
    true = (x @ matrix - g).norm(dim=1) / g.norm(dim=1).clamp_min(1e-300)
    assert float(true.max()) <= 2 * fitted.direct.backward_error()
