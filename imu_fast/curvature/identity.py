"""``M = I``: influence is the plain inner product of gradients."""

from __future__ import annotations

from torch import Tensor

from imu_fast.errors import check_choice
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.ops.bilinear_scores import gradient_norms
from imu_fast.ops.gram import cross_gram


class Identity:
    """The identity; ``damping`` is checked like everywhere and has no effect (SPEC section 2)."""

    residual = 0.0

    @classmethod
    def fit(cls, factors: GradientFactors, damping: float, damping_mode: str = "add") -> Identity:
        """Nothing to fit; the options are those of ``fisher_diag`` so that names can be swapped."""
        check_choice("damping_mode", damping_mode, ("add", "clamp"))
        return cls()

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = v``."""
        return v if out is None or out is v else out.copy_(v)

    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``||g_i||^2``: [n]."""
        return gradient_norms(factors.delta, factors.act, factors.offsets, factors.has_bias)

    def pairwise(self, factors: GradientFactors, queries: GradientFactors) -> Tensor:
        """``<g_i, h_j>``: [n, m]; no gradient is formed."""
        return cross_gram(
            (factors.delta, factors.act, factors.offsets),
            (queries.delta, queries.act, queries.offsets),
            factors.has_bias,
        )
