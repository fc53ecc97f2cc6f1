"""The empirical Fisher's dual solve against a dense float64 solve, and its certificate."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import CASES, IDS

import imu_fast as imu
from imu_fast import reference
from imu_fast.curvature import contraction
from imu_fast.errors import InputError


def make(case, dtype):
    p = case.make(dtype)
    return imu.GradientFactors.from_head(p.act, p.weight, p.bias, p.labels, p.offsets)


def gradients(f):
    return reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias).flatten(1)


@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[8]], ids=lambda case: case.why)
def test_some_samples_at_a_time(case, monkeypatch):
    """Factors in float32 are made float64 by the piece."""
    f = make(case, torch.float32)
    v = torch.randn(case.classes, f.width, dtype=torch.float64)
    whole = imu.fit("fisher", f.to(dtype=torch.float64), tolerance=1e-12)
    monkeypatch.setattr(contraction, "_ELEMENTS", 3 * 12)
    pieces = imu.fit("fisher", f, tolerance=1e-12)
    for name in ("product", "solve"):
        found, truth = getattr(pieces, name)(v), getattr(whole, name)(v)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(pieces.diagonal(), whole.diagonal(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("damping", [1e-1, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_on_every_case(case, damping, dtype):
    f = make(case, dtype)
    g = gradients(f)
    matrix = g.T @ g / f.n + damping * torch.eye(g.shape[1], dtype=torch.float64)
    v = torch.randn(case.classes, f.width, dtype=dtype)
    fitted = imu.fit("fisher", f, damping=damping, tolerance=1e-9)
    x = fitted.solve(v.double())
    true = float((matrix @ x.flatten() - v.double().flatten()).norm() / v.double().norm())
    assert fitted.residual <= 1e-9
    condition = float(torch.linalg.cond(matrix))
    # Rounding of the dense float64 product M x itself: P eps ||M|| ||x||, at most P eps cond ||v||.
    assert true <= 2 * fitted.residual + len(matrix) * 2.2e-16 * condition
    truth = torch.linalg.solve(matrix, v.double().flatten()).view_as(x)
    assert float((x - truth).norm() / truth.norm()) <= 2e-9 * condition


def test_works_for_factors_that_are_no_softmax_head_and_refuses_too_many(monkeypatch):
    f = make(CASES[1], torch.float32)
    other = imu.GradientFactors(f.delta, f.act, f.offsets, True)
    assert imu.influence_scores(other, curvature="fisher").isfinite().all()
    monkeypatch.setattr(sys.modules["imu_fast.curvature.fisher"], "MAX_SAMPLES", 12)
    with pytest.raises(InputError, match="n=13 needs an .*'fisher_diag'"):
        imu.influence_scores(f, curvature="fisher")
