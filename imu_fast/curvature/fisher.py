"""The whole empirical Fisher, solved exactly through its dual of size n."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Fitted, Layer, Saved, self_influence
from imu_fast.curvature.contraction import in_float64
from imu_fast.curvature.damping import Damped
from imu_fast.errors import InputError, check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors, in_memory
from imu_fast.factors.sums import joined, summed
from imu_fast.ops.bilinear_scores import bilinear_scores, gradient_norms
from imu_fast.ops.gram import Operands, cross_gram, gram
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.tokens import sample_of_token
from imu_fast.options import option, options
from imu_fast.solvers.cholesky.cholesky import damped_cholesky
from imu_fast.solvers.conjugate_gradient import refine

# The Gram matrix and its factor are [n, n] float64: 20,000 samples are 3.2 GB each.
MAX_SAMPLES = 20_000


@options
class Fisher(Damped):
    """``1/n sum_i g_i g_i^T + lam I``, the empirical Fisher.

    Attributes:
        damping, damping_mode: of lam: see :class:`Damped`.
        tolerance: of the true relative residual of a solve.
    """

    name = "fisher"
    tolerance: float = option(default=1e-6, check=check_positive)

    def fit(self, factors: Factors) -> FittedFisher:
        """The Gram matrix of the gradients [n, n], and its factor; all factors in memory.

        Raises:
            InputError: more than MAX_SAMPLES samples; shared among processes; lam relative to a
                mean that is zero or not finite.
        """
        if factors.n > MAX_SAMPLES:
            raise InputError(
                f"curvature='fisher' with n={factors.n} needs an [n, n] matrix; use at most "
                f"{MAX_SAMPLES} samples, or 'fisher_diag'"
            )
        f = in_memory(factors, "curvature='fisher'")

        def trace() -> float:
            norms = (gradient_norms(*_operands(piece), f.has_bias).sum() for piece in in_float64(f))
            return float(sum(norms)) / f.n

        return FittedFisher(f, self.absolute(f, trace), self.tolerance)


def _operands(piece: GradientFactors) -> Operands:
    return piece.delta, piece.act, piece.offsets


def _gram(factors: GradientFactors) -> Tensor:
    """``K`` in float64 [n, n], piece by piece of rows and columns."""
    if factors.dtype == torch.float64:
        return gram(*_operands(factors), factors.has_bias)
    k = factors.delta.new_empty(factors.n, factors.n, dtype=torch.float64)
    first = 0
    for left in in_float64(factors):
        rows = slice(first, first + left.n)
        k[rows, rows] = gram(*_operands(left), left.has_bias)
        first = start = rows.stop
        for right in in_float64(factors.samples(first, factors.n)) if first < factors.n else ():
            columns = slice(start, start + right.n)
            k[rows, columns] = cross_gram(_operands(left), _operands(right), left.has_bias)
            k[columns, rows] = k[rows, columns].t()
            start = columns.stop
    return k


class FittedFisher(Fitted):
    """Woodbury with one damped Cholesky of ``K/n + lam I``, K the gradients' Gram matrix.

    Everything is computed in float64: Woodbury's difference cancels by the condition number.

    Args:
        factors: kept as they are.

    Attributes:
        residual: relative residual of the last solve, recomputed in float64 (the largest of
            several right-hand sides).
    """

    def __init__(self, factors: GradientFactors, damping: float, tolerance: float) -> None:
        super().__init__(Fisher.name, Layer.of(factors), damping)
        factors = factors.with_delta(factors.delta)  # no loss and no curvature of it
        self.factors, self.tolerance = factors, tolerance
        k = _gram(factors).div_(factors.n)
        self._cholesky = damped_cholesky(k, damping, overwrite=True)

    def _forward(self, v: Tensor) -> Tensor:
        """``G v``: [n, m] for v [m, C, D]."""
        found = [
            bilinear_scores(piece.delta, piece.act, v, piece.offsets, piece.has_bias)
            for piece in in_float64(self.factors)
        ]
        return joined(found)

    def _add_adjoint(self, out: Tensor, alpha: Tensor, scale: float) -> Tensor:
        """``out + scale G^T alpha``, in place: out [m, C, D], alpha [n, m]."""
        first = 0
        for piece in in_float64(self.factors):
            of_token = first + sample_of_token(piece.offsets, piece.device)
            for one, column in zip(out, alpha.t(), strict=True):
                weighted = piece.delta * column[of_token, None]
                add_gradients(one, weighted, piece.act, piece.has_bias, beta=1.0, alpha=scale)
            first += piece.n
        return out

    def _product(self, v: Tensor) -> Tensor:
        many = (v if v.dim() == 3 else v[None]).double()
        out = self._add_adjoint(many * self.damping, self._forward(many), 1 / self.factors.n)
        return out.view_as(v)

    def _approximate(self, r: Tensor, _: float) -> tuple[Tensor, int]:
        alpha = self._cholesky.solve(self._forward(r))
        return self._add_adjoint(r, alpha, -1 / self.factors.n).div_(self.damping), 0

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        many = v if v.dim() == 3 else v[None]
        solution = refine(self._product, [self._approximate], many, tolerance=self.tolerance)
        self.residual = solution.residual
        return solution.x if v.dim() == 3 else solution.x[0]

    def _diagonal(self) -> Tensor:
        n = self.factors.n
        parts = (p.fisher_diagonal().mul_(p.n / n) for p in in_float64(self.factors))
        return summed(parts).add_(self.damping)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        f = self.factors
        tensors = {"delta": f.delta, "act": f.act, "offsets": f.offsets}
        return tensors, {"tolerance": self.tolerance}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        delta, act = (saved.tensors[name].to(saved.layer.device) for name in ("delta", "act"))
        f = GradientFactors(delta, act, saved.tensors["offsets"], saved.layer.has_bias)
        return cls(f, saved.damping, saved.options["tolerance"])

    def _self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; many right-hand sides at once."""
        values, self.residual = self_influence(self, factors)
        return values
