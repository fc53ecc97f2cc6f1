"""Iterative refinement: what it takes, and whose its tensors are."""

from __future__ import annotations

import pytest
import torch
from memory import peak

from imu_fast.solvers.conjugate_gradient import refine

_ROWS, _LENGTH = 4, 50_000


def _system():
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(_LENGTH, generator=generator, dtype=torch.float64) + 0.5
    return diagonal, torch.randn(_ROWS, _LENGTH, generator=generator)


@pytest.mark.parametrize("overwritten", [False, True])
def test_approximates_may_overwrite_their_residual(overwritten):
    diagonal, v = _system()

    def approximate(r, goal):
        x = r / (1.01 * diagonal)
        if overwritten:
            r.fill_(torch.nan)
        return x, 1

    found = refine(lambda x: x * diagonal, [approximate], v, tolerance=1e-12)
    torch.testing.assert_close(found.x, v.double() / diagonal, rtol=1e-11, atol=0)
    assert found.residual <= 1e-12
    assert found.iterations > 1


@pytest.mark.parametrize("together", [False, True])
def test_a_row_that_got_no_better_goes_on_from_its_own_residual(together):
    """Every second time the first row is answered with nonsense."""
    diagonal, v = _system()
    calls = []

    def approximate(r, goal):
        calls.append(len(r))
        x = r / (1.2 * diagonal)
        if len(calls) % 2 == 0:
            x[0] = 1e3
        return x, 1

    stages = [approximate] * 40
    found = refine(lambda x: x * diagonal, stages, v, tolerance=1e-10, together=together)
    torch.testing.assert_close(found.x, v.double() / diagonal, rtol=1e-9, atol=0)
    assert found.residual <= 1e-10


def test_rows_of_zeros_and_rows_that_no_stage_solves():
    diagonal, v = _system()
    v[1] = 0
    found = refine(lambda x: x * diagonal, [lambda r, goal: (r * 1e6, 0)], v, tolerance=1e-12)
    assert found.x.eq(0).all() and found.residual == 1.0


def test_memory_is_four_tensors_of_right_hand_sides():
    """x, a candidate, a right-hand side in float64 and its product; one more row's worth aside."""
    diagonal, v = _system()
    work = lambda: refine(  # noqa: E731
        lambda x: x * diagonal,
        [lambda r, goal: (r.div_(1.01 * diagonal), 1)],
        v,
        tolerance=1e-12,
    )
    assert peak(work) <= 4.3 * 8 * v.numel()
