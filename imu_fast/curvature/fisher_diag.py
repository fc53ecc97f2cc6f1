"""The diagonal of the empirical Fisher, damped: the authors' curvature (SPEC section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.curvature.base import PairsBySolves
from imu_fast.errors import check_choice
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal

DAMPING_MODES = ("add", "clamp")


class FisherDiag(PairsBySolves):
    """``diag(1/n sum_i g_i * g_i) + lam``, or ``max(diag, lam)`` with ``damping_mode="clamp"``.

    Attributes:
        diagonal: [C, D], damped.
    """

    residual = 0.0

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal

    @classmethod
    def fit(cls, factors: GradientFactors, damping: float, damping_mode: str = "add") -> FisherDiag:
        """Fit on ``factors``; ``damping_mode`` is ``"add"`` or ``"clamp"``."""
        check_choice("damping_mode", damping_mode, DAMPING_MODES)
        diagonal = fisher_diagonal(factors.delta, factors.act, factors.offsets, factors.has_bias)
        if damping_mode == "add":
            return cls(diagonal.add_(damping))
        return cls(diagonal.clamp_min_(damping))

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = v / diagonal``; v [C, D] or [m, C, D]."""
        return torch.div(v, self.diagonal, out=out)

    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``sum_ck g_i[c,k]^2 / diagonal[c,k]``: [n]."""
        return quadratic_scores(
            factors.delta,
            factors.act,
            self.diagonal.reciprocal(),
            factors.offsets,
            factors.has_bias,
        )
