"""The diagonal of the empirical Fisher, damped: the curvature of the IMU authors."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature, Fitted
from imu_fast.errors import check_positive, one_of
from imu_fast.factors.outputs import rows_of_outputs, sum_of_outputs
from imu_fast.factors.source import Factors, mean_of
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.options import option, options

DampingMode = Literal["add", "clamp"]


@options
class FisherDiag(Curvature):
    """``diag(1/n sum_i g_i * g_i) + lam``, or ``max(diag, lam)`` with ``damping_mode="clamp"``.

    Attributes:
        damping: lam > 0, in units of squared gradients. damping_mode: "add" or "clamp".
    """

    name = "fisher_diag"
    separates = True
    damping: float = option(default=1e-2, check=check_positive)
    damping_mode: DampingMode = option(default="add", check=one_of(*get_args(DampingMode)))

    def fit(self, factors: Factors) -> FittedFisherDiag:
        """One matrix product of squares where every sample has one token; else tile by tile."""
        diagonal = rows_of_outputs(factors, _diagonal)
        if self.damping_mode == "add":
            return FittedFisherDiag(diagonal.add_(self.damping))
        return FittedFisherDiag(diagonal.clamp_min_(self.damping))


class FittedFisherDiag(Fitted):
    """A diagonal matrix.

    Attributes:
        diagonal: [C, D], damped.
    """

    def __init__(self, diagonal: Tensor) -> None:
        classes, width = diagonal.shape
        super().__init__((classes, width), diagonal.device)
        self.diagonal = diagonal

    def _product(self, v: Tensor) -> Tensor:
        return v * self.diagonal

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        """``X = v / diagonal``; v [C, D] or [m, C, D]."""
        fits = out is not None and out.dtype == torch.promote_types(v.dtype, self.diagonal.dtype)
        return torch.div(v, self.diagonal, out=out if fits else None)

    def _self_influence(self, factors: Factors) -> Tensor:
        """``sum_ck g_i[c,k]^2 / diagonal[c,k]``: [n]."""

        def term(part: Factors, classes: slice) -> Tensor:
            inverse = self.diagonal[classes].reciprocal().to(factors.dtype)
            return part.each(
                lambda chunk: quadratic_scores(
                    chunk.delta, chunk.act, inverse, chunk.offsets, chunk.has_bias
                )
            )

        return sum_of_outputs(factors, term)


def _diagonal(source: Factors) -> Tensor:
    """Undamped: [C, D]."""
    return mean_of(
        source,
        lambda chunk: fisher_diagonal(chunk.delta, chunk.act, chunk.offsets, chunk.has_bias),
    )
