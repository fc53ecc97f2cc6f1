"""The whole empirical Fisher, solved exactly through its dual of size n."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Fitted, Layer, Saved, self_influence
from imu_fast.curvature.damping import Damped
from imu_fast.errors import InputError, check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors, in_memory
from imu_fast.ops.bilinear_scores import bilinear_scores, gradient_norms
from imu_fast.ops.gram import gram
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
        f = in_memory(factors, "curvature='fisher'").to(dtype=torch.float64)

        def trace() -> Tensor:
            return gradient_norms(f.delta, f.act, f.offsets, f.has_bias).sum() / f.n

        return FittedFisher(f, self.absolute(f, trace), self.tolerance)


class FittedFisher(Fitted):
    """Woodbury with one damped Cholesky of ``K/n + lam I``, K the gradients' Gram matrix.

    Everything is in float64: Woodbury's difference cancels by the condition number.

    Args:
        factors: float64.

    Attributes:
        residual: relative residual of the last solve, recomputed in float64 (the largest of
            several right-hand sides).
    """

    def __init__(self, factors: GradientFactors, damping: float, tolerance: float) -> None:
        super().__init__(Fisher.name, Layer.of(factors), damping)
        self.factors, self.tolerance = factors, tolerance
        f = factors
        self._token_sample = sample_of_token(f.offsets, f.delta.device)
        k = gram(f.delta, f.act, f.offsets, f.has_bias)
        self._cholesky = damped_cholesky(k.div_(f.n), damping, overwrite=True)

    def _forward(self, v: Tensor) -> Tensor:
        """``G v``: [n, m] for v [m, C, D]."""
        f = self.factors
        return bilinear_scores(f.delta, f.act, v, f.offsets, f.has_bias)

    def _add_adjoint(self, out: Tensor, alpha: Tensor, scale: float) -> Tensor:
        """``out + scale G^T alpha``, in place: out [m, C, D], alpha [n, m]."""
        f = self.factors
        for one, column in zip(out, alpha.t(), strict=True):
            weighted = f.delta * column[self._token_sample, None]
            add_gradients(one, weighted, f.act, f.has_bias, beta=1.0, alpha=scale)
        return out

    def _product(self, v: Tensor) -> Tensor:
        many = (v if v.dim() == 3 else v[None]).double()
        out = self._add_adjoint(many * self.damping, self._forward(many), 1 / self.factors.n)
        return out.view_as(v)

    def _approximate(self, r: Tensor, _: float) -> tuple[Tensor, int]:
        alpha = self._cholesky.solve(self._forward(r))
        return self._add_adjoint(r.clone(), alpha, -1 / self.factors.n) / self.damping, 0

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        many = v if v.dim() == 3 else v[None]
        solution = refine(self._product, [self._approximate], many, tolerance=self.tolerance)
        self.residual = solution.residual
        return solution.x if v.dim() == 3 else solution.x[0]

    def _diagonal(self) -> Tensor:
        return self.factors.fisher_diagonal().add_(self.damping)

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
