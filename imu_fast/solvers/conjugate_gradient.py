"""Conjugate gradient, and the refinement that makes any approximate solve exact and certified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """A solution and its certificate.

    Attributes:
        x: the solution, float64.
        residual: ``||M x - v|| / ||v||``, recomputed from x in float64, never from a recurrence.
        iterations: of the inner solver, over all refinement rounds; 0 for a direct one.
    """

    x: Tensor
    residual: float
    iterations: int


def conjugate_gradient(
    apply: Operator, v: Tensor, *, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Solve ``M x = v`` for symmetric positive definite M, in v's dtype (Hestenes, Stiefel 1952).

    Args:
        apply: ``x -> M x``. v: any shape. tolerance: on the recurrence's relative residual.

    Returns:
        x, and the number of products with M. Scalars are accumulated in float64.
    """

    def dot(a: Tensor, b: Tensor) -> float:
        return float(torch.dot(a.flatten(), b.flatten()))

    x, r, p = torch.zeros_like(v), v.clone(), v.clone()
    rho = dot(r, r)
    goal = tolerance**2 * rho
    for iteration in range(max_iterations):
        if rho <= goal:
            return x, iteration
        mp = apply(p)
        curvature = dot(p, mp)
        if not curvature > 0:  # rounding has used up the precision of this dtype
            return x, iteration + 1
        step = rho / curvature
        x.add_(p, alpha=step)
        r.sub_(mp, alpha=step)
        rho_next = dot(r, r)
        p.mul_(rho_next / rho).add_(r)
        rho = rho_next
    return x, max_iterations


def refine(
    apply64: Operator,
    approximate: Callable[[Tensor], tuple[Tensor, int]],
    v: Tensor,
    *,
    tolerance: float,
    max_rounds: int = 10,
) -> Solution:
    """Iterative refinement (Wilkinson 1963): solve in low precision, correct in float64.

    Args:
        apply64: ``x -> M x`` in float64.
        approximate: ``r -> (about M^-1 r, iterations)``; r float32.
        v: right-hand side. tolerance: on the true relative residual.

    Stops at the tolerance, or when a round no longer halves the residual.
    """
    v = v.double()
    size = float(v.norm())
    x, residual, total = torch.zeros_like(v), v, 0
    if size == 0:
        return Solution(x, 0.0, 0)
    relative = 1.0
    for _ in range(max_rounds):
        # Scaled to unit norm: a small residual must not underflow in float32.
        norm = float(residual.norm())
        correction, iterations = approximate((residual / norm).float())
        total += iterations
        candidate = x + correction.double() * norm
        new_residual = v - apply64(candidate)
        new_relative = float(new_residual.norm()) / size
        if not new_relative < relative:
            break
        stalled = new_relative > relative / 2
        x, residual, relative = candidate, new_residual, new_relative
        if relative <= tolerance or stalled:
            break
    return Solution(x, relative, total)
