"""The diagonal of the empirical Fisher, damped: the curvature of the IMU authors."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Curvature, Fitted, Layer, Saved
from imu_fast.curvature.damping import absolute_damping
from imu_fast.errors import check_positive, one_of
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.operands import check_result
from imu_fast.factors.outputs import rows_of_outputs, sum_of_outputs
from imu_fast.factors.source import Factors, mean_of
from imu_fast.factors.squares import diagonal_of, has_squares, in_float64, norm
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.options import option, options

DampingMode = Literal["add", "clamp", "relative"]


@options
class FisherDiag(Curvature):
    """``diag(1/n sum_i g_i * g_i) + lam``, or ``max(diag, lam)`` with ``damping_mode="clamp"``.

    Attributes:
        damping: lam > 0, in units of squared gradients. damping_mode: "add", "clamp", or
            "relative": lam is ``damping`` times the diagonal's mean, added.
    """

    name = "fisher_diag"
    damping: float = option(default=1e-2, check=check_positive)
    damping_mode: DampingMode = option(default="add", check=one_of(*get_args(DampingMode)))

    @property
    def separates(self) -> bool:
        """Unless lam is of the mean over all outputs."""
        return self.damping_mode != "relative"

    def fit(self, factors: Factors) -> FittedFisherDiag:
        """One matrix product of squares where every sample has one token; else tile by tile.

        Raises:
            InputError: lam relative to a mean that is zero or not finite, or beyond the range of
                the factors' dtype.
        """
        relative, given = self.damping_mode == "relative", None
        if not relative:  # refused before any work
            given = absolute_damping(self, self.damping, None, factors.dtype)

        def share(chunk: GradientFactors) -> Tensor:
            return diagonal_of(chunk, given, self.damping)

        diagonal = rows_of_outputs(factors, lambda part: mean_of(part, share))
        if not _surely_finite(factors):
            check_result("the Fisher's diagonal", diagonal, factors)
        mean = float(diagonal.mean(dtype=torch.float64)) if relative else None
        lam = absolute_damping(self, self.damping, mean, diagonal.dtype)
        clamped = self.damping_mode == "clamp"
        damped = diagonal.clamp_min_(lam) if clamped else diagonal.add_(lam)
        return FittedFisherDiag(self.name, Layer.of(factors), lam, damped)


class FittedFisherDiag(Fitted):
    """A diagonal matrix.

    Attributes:
        damped: the diagonal [C, D], damping included.
    """

    def __init__(self, curvature: str, layer: Layer, damping: float, damped: Tensor) -> None:
        super().__init__(curvature, layer, damping, damped.dtype)
        self.damped = damped

    def _product(self, v: Tensor) -> Tensor:
        return v * self.damped

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        """``X = v / diagonal``; v [C, D] or [m, C, D]."""
        fits = out is not None and out.dtype == torch.promote_types(v.dtype, self.damped.dtype)
        return torch.div(v, self.damped, out=out if fits else None)

    def _diagonal(self) -> Tensor:
        return self.damped.clone()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"damped": self.damped}, {}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        damped = saved.tensors["damped"]
        return cls(saved.curvature, saved.layer, saved.damping, damped.to(saved.layer.device))

    def _self_influence(self, factors: Factors) -> Tensor:
        """``sum_ck g_i[c,k]^2 / diagonal[c,k]``: [n]."""
        # A large diagonal in units of one of its entries, or of less where others are far below it:
        # squares of small signals over it would underflow before those of the features make them
        # numbers again. A power of two rounds nothing.
        large = max(1.0, min(float(self.damped[0, 0]), self.damping * 2.0**80))
        unit = 2.0 ** (math.frexp(large)[1] - 1)

        def term(part: Factors, classes: slice) -> Tensor:
            damped = self.damped[classes]
            inverse = (damped if unit == 1 else damped / unit).reciprocal().to(factors.dtype)
            return part.each(lambda chunk: forms(chunk, inverse))

        def forms(chunk: GradientFactors, inverse: Tensor) -> Tensor:
            if not has_squares(chunk, self.damping):
                return in_float64(quadratic_scores, chunk, inverse.double())
            operands = chunk.delta, chunk.act, inverse, chunk.offsets, chunk.has_bias
            return quadratic_scores(*operands)

        found = sum_of_outputs(factors, term)
        return found if unit == 1 else found.div_(unit)


def _surely_finite(factors: Factors) -> bool:
    """Whether a bound on the diagonal's entries is finite: cheap where samples are few."""
    if not isinstance(factors, GradientFactors) or not factors.num_tokens:
        return False
    size = factors.num_classes * factors.width
    if factors.num_tokens * (factors.num_classes + factors.feature_dim) >= size:
        return False  # than to look at the entries themselves
    # By Cauchy and Schwarz, of one sample and so of their mean.
    delta, act = (norm(x, factors.dtype) for x in (factors.delta, factors.act))
    one = delta * (act + math.sqrt(factors.num_tokens))
    return one * one < torch.finfo(factors.dtype).max / 2
