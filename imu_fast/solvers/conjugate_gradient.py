"""Conjugate gradient, and the refinement that makes any approximate solve exact and certified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_fast.ops.conjugate_gradient import iterate, iterations_between_looks, start

Operator = Callable[[Tensor], Tensor]
# ``r, goal -> about M^-1 r, iterations``: goal is the relative residual that would be enough.
Approximate = Callable[[Tensor, float], tuple[Tensor, int]]


@dataclass(frozen=True)
class Solution:
    """A solution and its certificate.

    Attributes:
        x: [m, ...], the solutions, float64.
        residual: the largest ``||M x - v|| / ||v||`` of the m, recomputed from x in float64, never
            from a recurrence.
        iterations: of the inner solver, over all refinement rounds; 0 for a direct one.
    """

    x: Tensor
    residual: float
    iterations: int


def conjugate_gradient(
    apply: Operator,
    v: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    precondition: Operator | None = None,
    give_up: Callable[[int, float], bool] | None = None,
) -> tuple[Tensor, int]:
    """Solve ``M x = v`` for symmetric positive definite M, in v's dtype (Hestenes, Stiefel 1952).

    The m right-hand sides are m separate iterations in step, so that their products with M are
    one; those that have converged stand still, and are left out at the next look.

    Args:
        apply: ``x -> M x``, row by row. v: [m, ...]. tolerance: on the recurrence's relative
            residual of each row.
        precondition: ``r -> about M^-1 r``, symmetric positive definite.
        give_up: asked at each look with the iterations so far and the factor that the worst
            residual is still to be reduced by; True ends all where they are.

    Returns:
        x, and the number of products with M: rows times iterations.
    """
    solution, products = torch.zeros_like(v), 0
    rows = torch.arange(len(v), device=v.device)
    state = start(v, v if precondition is None else precondition(v), tolerance)
    every = iterations_between_looks(v.device)
    for iteration in range(max_iterations):
        if iteration % every == 0 and not bool((moving := state.moving).all()):
            solution[rows] = state.x
            rows, state = rows[moving], state.keep(moving)
            if not len(rows):
                break
        if give_up is not None and iteration % every == 0:
            ahead = float((state.size / state.goal).max().sqrt())
            if give_up(iteration, ahead):
                solution[rows] = state.x
                break
        state = iterate(state, apply(state.p), precondition)
        products += len(rows)
    else:
        solution[rows] = state.x
    return solution, products


def refine(
    apply64: Operator,
    approximates: Sequence[Approximate],
    v: Tensor,
    *,
    tolerance: float,
    max_rounds: int = 10,
    together: bool = False,
) -> Solution:
    """Iterative refinement (Wilkinson 1963): solve in low precision, correct in float64.

    Args:
        apply64: ``x -> M x`` in float64, row by row of [k, ...].
        approximates: of rising precision, each ``r, goal -> (about M^-1 r, iterations)`` for r
            [k, ...] float64 with rows of unit norm, which is theirs to overwrite, where a relative
            residual of goal would end it; the next takes over the rows where one stalls.
        v: [m, ...], m right-hand sides. tolerance: on the true relative residual of each.
        together: always pass all m rows on (each has its own M), while one is above the tolerance.

    A row stops at the tolerance, one of zeros at once; it has stalled when a round no longer halves
    its residual.
    """
    column = (-1,) + (1,) * (v.dim() - 1)
    # Of unit size, so that norms neither underflow nor overflow; a NaN stays one.
    size = v.flatten(1).abs().amax(dim=1).double().view(column)
    size = size.where((size != 0) & ~size.isinf(), 1.0)

    def right(rows: Tensor) -> Tensor:
        return v[rows].double().div_(size[rows])

    # Tensors of v's size are the memory of a solve: v is widened anew each time, and what is used
    # no more is deleted before the next is made.
    everyone = torch.arange(len(v), device=v.device)
    norms = right(everyone).flatten(1).norm(dim=1)
    x = torch.zeros((), dtype=torch.float64, device=v.device).expand(v.shape)
    total, moved = 0, False
    relative = (norms != 0).double()
    for approximate in approximates:
        active = torch.nonzero(relative > tolerance).flatten()
        if together and len(active):
            active = everyone
        r: Tensor | None = None
        for _ in range(max_rounds):
            if not len(active):
                break
            if r is None:
                r = right(active).sub_(apply64(x[active])) if moved else right(active)
            # Scaled to unit norm: a small residual must not underflow in a float32 solver.
            scale = r.flatten(1).norm(dim=1).view(column)
            scale = scale.where(scale > 0, 1.0)
            goal = tolerance / float(relative[active].max())
            r.div_(scale)
            correction, iterations = approximate(r, goal)
            del r
            total += iterations
            candidate = x[active].add_(correction.double() * scale)
            del correction
            r = right(active).sub_(apply64(candidate))
            new = r.flatten(1).norm(dim=1) / norms[active].where(norms[active] > 0, 1.0)
            better, old = new < relative[active], relative[active]
            rows = active[better]
            relative[rows] = new[better]
            if len(rows) == len(v):
                x = candidate
            else:
                x = x.contiguous()
                x[rows] = candidate[better]
            del candidate
            moved = moved or len(rows) > 0
            going = better & (new > tolerance) & (new <= old / 2)
            if together and bool(going.any()):
                # All go on, from what each has: of a row that got no better that is not r.
                r = r if bool(better.all()) else None
            else:
                r, active = r[going], active[going]
    return Solution(x * size, float(relative.max()), total)
