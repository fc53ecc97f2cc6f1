"""Solves by a damped Cholesky factor to float64 accuracy, whatever precision the factor is in."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from imu_fast.backend import use_backend
from imu_fast.solvers.conjugate_gradient import Solution, conjugate_gradient, refine

# Of conjugate gradient in a round of refinement. A factor that exists by its bound takes 22 for
# 1e-12; what has not converged after these gains little from more.
_MAX_ITERATIONS = 100


class Factor(Protocol):
    """What a :class:`~imu_fast.solvers.cholesky.cholesky.DampedCholesky` offers."""

    @property
    def factor(self) -> Tensor: ...
    @property
    def damping(self) -> float: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def solve(self, b: Tensor) -> Tensor: ...


def together(factor: Factor, a: Tensor, columns: Tensor, tolerance: float) -> Solution:
    """All matrices at once, by the factor in A's own dtype.

    Args:
        a: A [..., P, P], all of it. columns: b [..., P, m], float64.
        tolerance: on each right-hand side's true relative residual.

    Returns:
        x is [batch, P, m].
    """
    if not columns.numel():
        return Solution(columns, 0.0, 0)
    order, many = columns.shape[-2:]
    wide = a.double().reshape(-1, order, order)

    def turned(x: Tensor) -> Tensor:
        """The right-hand sides as rows [batch m, P], or back: [batch, P, m]."""
        return x.reshape(-1, many, order).mT if x.dim() == 2 else x.mT.reshape(-1, order)

    def product(x: Tensor) -> Tensor:
        return turned(wide @ turned(x)) + factor.damping * x

    def approximate(r: Tensor, _: float) -> tuple[Tensor, int]:
        x = factor.solve(turned(r).to(factor.dtype).reshape(columns.shape))
        return turned(x.double().reshape(-1, order, many)), 0

    b = turned(columns.reshape(-1, order, many))
    solution = refine(product, [approximate], b, tolerance=tolerance, together=True)
    return replace(solution, x=turned(solution.x))


def each(factor: Factor, a: Tensor, columns: Tensor, tolerance: float) -> Solution:
    """Matrix by matrix, by conjugate gradient that the factor preconditions; as :func:`together`.

    With a factor in a lower precision alone refinement would stall.
    """
    if not columns.numel():
        return Solution(columns, 0.0, 0)
    order = a.shape[-1]
    systems = zip(
        a.reshape(-1, order, order),
        factor.factor.reshape(-1, order, order),
        columns.reshape(-1, order, columns.shape[-1]),
        strict=True,
    )
    found = [
        _one(replace(factor, factor=upper, matrix=None, dtype=torch.float64), matrix, b, tolerance)  # type: ignore[type-var]
        for matrix, upper, b in systems
    ]
    return Solution(
        torch.stack([one.x for one in found]),
        max(one.residual for one in found),
        sum(one.iterations for one in found),
    )


def _one(factor: Factor, a: Tensor, b: Tensor, tolerance: float) -> Solution:
    """One matrix; b and x [P, m]."""
    wide = a.double()

    def product(x: Tensor) -> Tensor:
        return torch.addmm(x, x, wide.mT, beta=factor.damping)

    def precondition(r: Tensor) -> Tensor:
        return factor.solve(r.mT).mT

    def approximate(r: Tensor, goal: float) -> tuple[Tensor, int]:
        # The iteration's kernels are float32's, which would take more solves with the factor.
        with use_backend("torch"):
            return conjugate_gradient(
                product,
                r,
                tolerance=goal / 2,  # the recurrence's residual is not quite the true one
                max_iterations=_MAX_ITERATIONS,
                precondition=precondition,
            )

    solution = refine(product, [approximate], b.mT, tolerance=tolerance)
    return replace(solution, x=solution.x.mT)
