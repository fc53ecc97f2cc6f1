"""Iterations of conjugate gradient against the textbook's, and systems that stand still."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import Call, check_conjugate_gradient, every_dtype, positive_systems

import imu_fast as imu
from imu_fast.ops import extension
from imu_fast.ops.conjugate_gradient import iterate, start
from imu_fast.solvers import conjugate_gradient as solver


def operands(case, dtype, preconditioned):
    """The first iteration of three systems; the second has ended, the third's curvature is none."""
    wide = torch.float64
    v = torch.randn(3, case.classes, case.features, dtype=wide)
    diagonal = (1 + torch.rand(case.classes, case.features, dtype=wide)).to(dtype)
    v[1] = 0
    v = v.to(dtype)

    def precondition(r):
        return r / diagonal.to(r.dtype)

    state = start(v, precondition(v) if preconditioned else v, tolerance=1e-3)
    mp = state.p * (diagonal + 0.5)
    mp[2].neg_()
    length, one = v[0].numel(), float(v.abs().max())
    squares = float(v.square().sum())
    # x, r, p, then r.z and r.r, the goal, and steps that are below one.
    sizes = [one, 2 * one, 3 * one, squares, squares, None, 1.0]
    args = (state, mp, precondition if preconditioned else None)
    return Call(args, 2 * length, [*sizes, *sizes], changes=(0,))


OPERANDS = {
    "conjugate_gradient_iteration": {
        "plain": partial(operands, preconditioned=False),
        "preconditioned": partial(operands, preconditioned=True),
    }
}


def test_the_goal_is_of_the_relative_residual():
    v = torch.randn(2, 3, 4, dtype=torch.float64)
    state = start(v, v, tolerance=1e-3)
    norms = v.flatten(1).norm(dim=1)
    torch.testing.assert_close(state.goal.flatten().sqrt(), 1e-3 * norms)
    assert state.goal.shape == state.rho.shape == state.size.shape == (2, 1, 1)


def test_products_of_long_rows_are_summed_in_pieces(monkeypatch):
    v, z = torch.randn(2, 3, 7, 11, dtype=torch.float64)
    monkeypatch.setattr(sys.modules["imu_fast.ops.conjugate_gradient"], "_PIECE", 8)
    state = start(v, z, tolerance=1e-3)
    torch.testing.assert_close(state.rho.flatten(), (v * z).sum(dim=(1, 2)))
    torch.testing.assert_close(state.size.flatten(), (v * v).sum(dim=(1, 2)))


def test_vectors_in_half_precision_have_no_kernel():
    v = torch.randn(2, 3)
    assert iterate.limits(start(v, v, 1e-3), v) == ""
    said = "the vectors are torch.bfloat16; the kernels take float32"
    assert iterate.limits(start(v.bfloat16(), v.bfloat16(), 1e-3), v.bfloat16()) == said


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 6)], ids=str)
@every_dtype
def test_iterations_are_the_textbooks(shape, preconditioned, dtype):
    check_conjugate_gradient(shape, preconditioned, dtype)


def test_a_system_that_has_ended_stands_still():
    """The second is zero, the third's curvature negative; the first goes on beside them."""
    matrix, v, _ = positive_systems((3, 6), torch.float64)
    v[1] = 0
    sign = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    state = start(v, v, tolerance=1e-12)
    assert state.moving.tolist() == [True, False, True]
    for _ in range(3):
        state = iterate(state, sign * (state.p @ matrix))
        assert state.moving.tolist() == [True, False, False]
    assert not state.x[1:].any() and torch.equal(state.p[1:], v[1:])
    assert state.keep(state.moving).x.shape == (1, 6)


@pytest.mark.parametrize("every", [1, 3, 8])
def test_looking_less_often_changes_products_and_no_digit_that_counts(every, monkeypatch):
    matrix, v, _ = positive_systems((4, 9), torch.float64)
    v[2] = 1e-9 * matrix @ v[0]
    options = dict(tolerance=1e-6, max_iterations=40)
    expected, products = solver.conjugate_gradient(lambda x: x @ matrix, v, **options)
    monkeypatch.setattr(solver, "iterations_between_looks", lambda device: every)
    x, more = solver.conjugate_gradient(lambda x: x @ matrix, v, **options)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=0)
    assert products <= more <= products + 4 * every


def test_solves_under_the_reference_backend():
    matrix, v, _ = positive_systems((2, 5), torch.float64)
    with imu.use_backend("reference"):
        x, _ = solver.conjugate_gradient(
            lambda x: x @ matrix, v, tolerance=1e-12, max_iterations=20
        )
    torch.testing.assert_close(x @ matrix, v)


def iterated(v, diagonal, precondition, threads=1):
    """On M = diagonal; of few unknowns one iteration: residuals are rounding alone soon."""
    state = start(v, v if precondition is None else precondition(v), tolerance=1e-6)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3 if diagonal.numel() > 100 else 1):
            state = iterate(state, state.p * diagonal, precondition)
    finally:
        torch.set_num_threads(before)
    return state


@pytest.mark.skipif(extension.load() is None, reason="no compiled module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 65), (1, 17, 4099), (2, 10, 4096)], ids=str)
def test_compiled_and_not_are_one_iteration(monkeypatch, shape, preconditioned, dtype):
    """Rows of less than a vector, of several pieces, and of a piece and a bit."""
    v, diagonal = torch.randn(shape, dtype=dtype), 1 + 9 * torch.rand(shape[1:], dtype=dtype)

    def precondition(r):
        return r * diagonal.flip(-1)

    how = precondition if preconditioned else None
    found = iterated(v, diagonal, how)
    for one, other in zip(found, iterated(v, diagonal, how, threads=3), strict=True):
        assert torch.equal(one, other), "the number of threads changes no bit"
    monkeypatch.setattr(sys.modules["imu_fast.ops.conjugate_gradient"], "_extension", no_extension)
    # Sums of K products, and a few iterations on top of each other.
    tolerance = 8 * (v[0].numel() + 10) * torch.finfo(dtype).eps
    for one, other in zip(found, iterated(v, diagonal, how), strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * size)


def no_extension(state, mp):
    return None


def test_what_is_not_finite_stays_so():
    v = torch.full((1, 2, 3), torch.nan)
    assert bool(iterated(v, torch.ones(2, 3), None).x.isnan().all())
