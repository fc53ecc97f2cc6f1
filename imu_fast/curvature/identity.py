"""``M = I``: influence is the plain inner product of gradients."""

from __future__ import annotations

from torch import Tensor

from imu_fast.curvature.base import Curvature, Fitted
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.ops.bilinear_scores import gradient_norms
from imu_fast.ops.gram import cross_gram
from imu_fast.options import options


@options
class Identity(Curvature):
    """``I``; there is nothing to damp."""

    name = "identity"

    def fit(self, factors: GradientFactors) -> FittedIdentity:
        """Nothing is read."""
        return FittedIdentity()


class FittedIdentity(Fitted):
    """``I``."""

    def product(self, v: Tensor) -> Tensor:
        """``v``, a copy."""
        return v.clone()

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = v``, a copy unless ``out`` is v."""
        if out is None:
            return v.clone()
        return v if out is v else out.copy_(v)

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
