"""Quadratic programs with nonnegative variables, the duals of hard-margin problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imu_fast.solvers.cholesky import damped_cholesky

# Coordinates whose mutual updates stay in cache; the rest of the gradient is updated once a block.
_BLOCK = 128
# A Newton step costs k^3 / 3, a sweep 2 k^2; by then sweeps have mostly found the support.
_SWEEPS_PER_NEWTON_STEP = 20
_MAX_HALVINGS = 10


@dataclass(frozen=True)
class Maximum:
    """A maximiser of a concave quadratic over the nonnegative orthant.

    Attributes:
        alpha: [k], float64, all >= 0. value: the objective there.
        sweeps: coordinate-ascent sweeps that were made.
        converged: False if the sweeps ran out or the value passed its limit.
    """

    alpha: Tensor
    value: float
    sweeps: int
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
            gradient -= change @ rows


def _newton_step(q: Tensor, b: Tensor, alpha: Tensor, gradient: Tensor) -> Tensor:
    """A projected Newton step (Bertsekas 1982) on the variables that are not held at zero.

    Their system is one damped Cholesky; its damping is the backward error of the factorisation, so
    that it works for singular q. Halved until the objective rises, or not taken.
    """
    free = torch.nonzero((alpha > 0) | (gradient > 0)).flatten()
    system = q[free][:, free]
    trace = float(system.diagonal().sum())
    damping = len(free) * torch.finfo(q.dtype).eps * trace
    direction = damped_cholesky(system, damping, overwrite=True).solve(gradient[free])
    for halving in range(_MAX_HALVINGS):
        step = torch.zeros_like(alpha)
        step[free] = (alpha[free] + 0.5**halving * direction).clamp_min(0) - alpha[free]
        if float(step @ gradient - 0.5 * (step @ (q @ step))) > 0:
            return alpha + step
    return alpha


def maximise_nonnegative(
    q: Tensor,
    b: Tensor,
    start: Tensor,
    *,
    tolerance: float,
    max_sweeps: int = 1000,
    limit: float = float("inf"),
) -> Maximum:
    """``max_{alpha >= 0}  b.alpha - 1/2 alpha^T Q alpha``.

    Blocked cyclic coordinate ascent, with a projected Newton step on the support after every
    20th sweep. Sweeps alone win where Q is well conditioned; the Newton steps end the crawl where
    it is not (more constraints than the constrained matrix has entries). Both only ever raise the
    objective, so their mixture converges as coordinate ascent does.

    Args:
        q: [k, k], symmetric positive semi-definite with a positive diagonal, float64, on the CPU.
        b, start: [k], float64; start >= 0.
        tolerance: on the largest gradient entry relative to that of b, and on ``alpha . gradient``
            relative to ``1/2 alpha^T Q alpha``.
        limit: stop once the objective, a lower bound on the primal optimum, exceeds it.

    Memory: ``3 k^2`` numbers with q. Deterministic for a given number of threads.
    """
    alpha = start.clone()
    scale = float(b.abs().max())
    diagonal, matrix = q.diagonal().numpy(), q.numpy()
    for sweeps in range(max_sweeps + 1):
        if sweeps and sweeps % _SWEEPS_PER_NEWTON_STEP == 0:
            alpha = _newton_step(q, b, alpha, b - q @ alpha)
        if sweeps % _SWEEPS_PER_NEWTON_STEP == 0:
            gradient = b - q @ alpha  # afresh: the sweeps' running one gathers rounding errors
        energy = 0.5 * float(alpha @ (b - gradient))
        value = float(alpha @ b) - energy
        slack = abs(float(alpha @ gradient))
        if float(gradient.max()) <= tolerance * scale and slack <= tolerance * energy:
            return Maximum(alpha, value, sweeps, True)
        if value > limit or sweeps == max_sweeps:
            break
        _sweep(matrix, diagonal, alpha.numpy(), gradient.numpy())
    return Maximum(alpha, value, sweeps, False)
