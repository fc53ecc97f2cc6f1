"""The empirical Fisher of projected gradients, block by block, and what is solved with it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from imu_fast.curvature.damping import absolute_damping
from imu_fast.curvature.fisher import Fisher
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import joined
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky
from imu_fast.solvers.conjugate_gradient import refine

# Of the mean eigenvalue: the damping of Grosse et al. 2023 and of LoGra (Choe et al. 2024).
DAMPING = 0.1


def as_factors(rows: Tensor, name: str) -> GradientFactors:
    """Projections [n, K] as factors of a layer with one output, in float64: ``g_i = 1 (x) row``."""
    ones = torch.ones(len(rows), 1, dtype=torch.float64, device="cpu")
    ends = torch.arange(len(rows) + 1, device="cpu")
    return GradientFactors(ones, rows.double(), ends, False, name=name)


def blocks_of(widths: list[int]) -> list[slice]:
    """Which columns of a projection are whose, layer after layer."""
    ends = [0, *itertools.accumulate(widths)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def second_moments(source: Factors, blocks: list[slice]) -> list[Tensor]:
    """``G^T G / n`` of each block [k, k], float64, in one pass over the samples."""
    sums = source.sums(lambda c: tuple(c.act[:, block].T @ c.act[:, block] for block in blocks))
    return [total.div_(source.n) for total in sums]


class ProjectedFisher:
    """``M = G^T G / n + lam I``, block diagonal over layers (the form of TRAK and LoGra).

    Args:
        moments: ``G^T G / n`` of each block. spec: damping, per block where it is relative.

    Raises:
        InputError: damping relative to a mean eigenvalue that is zero.
    """

    def __init__(self, moments: list[Tensor], spec: Fisher) -> None:
        self._moments, self._tolerance = moments, spec.tolerance
        relative = spec.damping_mode == "relative"
        means = [float(m.diagonal().mean()) if relative else None for m in moments]
        self._dampings = [absolute_damping(spec, spec.damping, m, torch.float64) for m in means]
        self._factors = [
            damped_cholesky(m, lam) for m, lam in zip(moments, self._dampings, strict=True)
        ]

    def solved(self, factors: GradientFactors) -> GradientFactors:
        """``M^-1 h_j`` of each sample of projections, to the tolerance of the curvature."""
        columns, first = [], 0
        for moment, lam, factor in zip(self._moments, self._dampings, self._factors, strict=True):
            block = slice(first, first + len(moment))
            columns.append(self._block(moment, lam, factor, factors.act[:, block]))
            first = block.stop
        return as_factors(torch.cat(columns, dim=1), factors.name)

    def _block(self, moment: Tensor, lam: float, factor: DampedCholesky, rows: Tensor) -> Tensor:
        solution = refine(
            lambda x: (x @ moment).add_(x, alpha=lam),
            [lambda r, _: (factor.solve_columns(r.T).T, 0)],
            rows,
            tolerance=self._tolerance,
        )
        return solution.x

    def self_influence(self, source: Factors) -> Tensor:
        """``g_i^T M^-1 g_i`` of every sample: [n] float64."""
        parts = ((c.act * self.solved(c).act).sum(dim=1) for c in source.chunks())
        return joined(parts)
