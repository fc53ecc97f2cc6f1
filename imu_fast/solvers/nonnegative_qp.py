"""Quadratic programs with nonnegative variables, the duals of hard-margin problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imu_fast.solvers.cholesky.cholesky import damped_cholesky

# Coordinates whose mutual updates stay in cache; the rest of the gradient is updated once a block.
_BLOCK = 128
# What one Newton step costs, about, for k from 500 to 5,000 and its usual support.
_SWEEPS_PER_NEWTON_STEP = 5
_MAX_HALVINGS = 10
# Where the sweeps have not converged by then Q is singular or nearly so.
_MAX_SWEEPS = 100
_MAX_INTERIOR_STEPS = 100


@dataclass(frozen=True)
class Maximum:
    """A maximiser of a concave quadratic over the nonnegative orthant.

    Attributes:
        alpha: [k], float64, all >= 0. value: the objective there.
        sweeps: coordinate-ascent sweeps that were made. interior_steps: after them.
        converged: False if the steps ran out or the value passed its limit.
    """

    alpha: Tensor
    value: float
    sweeps: int
    interior_steps: int
    converged: bool


def _sweep(q: np.ndarray, diagonal: np.ndarray, alpha: np.ndarray, gradient: np.ndarray) -> None:
    """One pass of cyclic coordinate ascent (Hildreth 1957), in place, block by block."""
    for start in range(0, len(alpha), _BLOCK):
        block = slice(start, start + _BLOCK)
        rows = q[block]
        inner = np.ascontiguousarray(rows[:, block])
        mine, own, scale = gradient[block].copy(), alpha[block].tolist(), diagonal[block].tolist()
        for j, (value, q_jj) in enumerate(zip(own, scale, strict=True)):
            moved = max(value + float(mine[j]) / q_jj, 0.0) - value
            if moved:
                own[j] = value + moved
                mine -= moved * inner[j]
        change = np.asarray(own) - alpha[block]
        if change.any():
            alpha[block] = own
            # Not BLAS, whose threads wait for each other at every block: on shared cores that
            # costs several times what its faster product saves.
            gradient -= np.einsum("i,ij->j", change, rows)


def _backward_error(q: Tensor) -> float:
    """The damping that rounding makes any factorisation of q have, so that a singular q passes."""
    return len(q) * torch.finfo(q.dtype).eps * float(q.diagonal().sum())


def _newton_step(q: Tensor, b: Tensor, alpha: Tensor, gradient: Tensor) -> Tensor:
    """A projected Newton step (Bertsekas 1982) on the variables that are not held at zero.

    Their system is one damped Cholesky. Halved until the objective rises, or not taken.
    """
    free = torch.nonzero((alpha > 0) | (gradient > 0)).flatten()
    system = q[free][:, free]
    factor = damped_cholesky(system, _backward_error(system), overwrite=True)
    direction = factor.solve(gradient[free])
    for halving in range(_MAX_HALVINGS):
        step = torch.zeros_like(alpha)
        step[free] = (alpha[free] + 0.5**halving * direction).clamp_min(0) - alpha[free]
        if float(step @ gradient - 0.5 * (step @ (q @ step))) > 0:
            return alpha + step
    return alpha


def _longest_step(x: Tensor, direction: Tensor) -> float:
    """The largest t <= 1 with ``x + t direction >= 0``."""
    falling = direction < 0
    return min(1.0, float((-x[falling] / direction[falling]).min())) if falling.any() else 1.0


def _interior_step(q: Tensor, b: Tensor, alpha: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Mehrotra's (1992) predictor and corrector for ``Q alpha - b = slack``, both positive.

    One damped Cholesky, of ``Q + diag(slack / alpha)``. Indifferent to a singular q.
    """
    residual, ratio = q @ alpha - b - slack, slack / alpha
    system = q.clone()
    system.diagonal().add_(ratio)
    factor = damped_cholesky(system, _backward_error(q), overwrite=True)
    mean = float(alpha @ slack) / len(b)
    d_alpha = factor.solve(-residual - slack)
    d_slack = -slack - ratio * d_alpha
    ahead = (alpha + _longest_step(alpha, d_alpha) * d_alpha) @ (
        slack + _longest_step(slack, d_slack) * d_slack
    )
    centring = (float(ahead) / len(b) / mean) ** 3
    complement = (centring * mean - d_alpha * d_slack) / alpha
    d_alpha = factor.solve(-residual - slack + complement)
    d_slack = -slack + complement - ratio * d_alpha
    t = 0.995 * min(_longest_step(alpha, d_alpha), _longest_step(slack, d_slack))
    return alpha + t * d_alpha, slack + t * d_slack


def maximise_nonnegative(
    q: Tensor,
    b: Tensor,
    start: Tensor,
    *,
    tolerance: float,
    limit: float = float("inf"),
    max_sweeps: int = _MAX_SWEEPS,
    max_interior_steps: int = _MAX_INTERIOR_STEPS,
) -> Maximum:
    """``max_{alpha >= 0}  b.alpha - 1/2 alpha^T Q alpha``.

    Blocked cyclic coordinate ascent with a projected Newton step on the support after every fifth
    sweep: each only ever raises the objective, and from a good start this is the cheapest. Where Q
    is singular (more constraints than the constrained matrix has entries) both crawl; what has not
    converged after ``max_sweeps`` is solved by a primal-dual interior-point method instead, a dozen
    or two Cholesky factorisations of Q's full size.

    Args:
        q: [k, k], symmetric positive semi-definite with a positive diagonal, float64, on the CPU.
        b, start: [k], float64; start >= 0.
        tolerance: on the largest gradient entry relative to that of b, and on ``alpha . gradient``
            relative to ``1/2 alpha^T Q alpha``.
        limit: stop once the objective, a lower bound on the primal optimum, exceeds it.

    Memory: ``3 k^2`` numbers with q. Deterministic for a given number of threads.
    """
    scale = float(b.abs().max())

    def measure(alpha: Tensor, gradient: Tensor) -> tuple[float, bool]:
        energy = 0.5 * float(alpha @ (b - gradient))
        met = float(gradient.max()) <= tolerance * scale
        tight = abs(float(alpha @ gradient)) <= tolerance * energy
        return float(alpha @ b) - energy, met and tight

    alpha, sweeps = start.clone(), 0
    diagonal, matrix = q.diagonal().numpy(), q.numpy()
    while True:
        if sweeps % _SWEEPS_PER_NEWTON_STEP == 0:
            gradient = b - q @ alpha  # afresh: the sweeps' running one gathers rounding errors
        value, converged = measure(alpha, gradient)
        if converged or value > limit:
            return Maximum(alpha, value, sweeps, 0, converged)
        if sweeps == max_sweeps:
            break
        if sweeps and sweeps % _SWEEPS_PER_NEWTON_STEP == 0:
            alpha = _newton_step(q, b, alpha, gradient)
            gradient = b - q @ alpha
        _sweep(matrix, diagonal, alpha.numpy(), gradient.numpy())
        sweeps += 1

    alpha, slack = torch.full_like(b, scale / float(q.diagonal().mean())), torch.full_like(b, scale)
    steps = 0
    while steps < max_interior_steps and not converged and value <= limit:
        alpha, slack = _interior_step(q, b, alpha, slack)
        value, converged = measure(alpha, b - q @ alpha)
        steps += 1
    return Maximum(alpha, value, sweeps, steps, converged)
