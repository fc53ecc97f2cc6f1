"""The GGN solved by a damped Cholesky factor: of the matrix itself, or of its dual."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imu_fast.curvature.base import gradient_slabs
from imu_fast.curvature.ggn.dense import contrasts, dual_matrix, primal_matrix
from imu_fast.errors import SingularMatrixError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented
from imu_fast.factors.source import Factors, Remembered, in_memory
from imu_fast.losses.cross_entropy import Softmax
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky
from imu_fast.solvers.conjugate_gradient import Approximate

# Elements of the per-sample gradients that self-influence solves for at once: in cache.
_HALVES = 1 << 20


class Direct:
    """``M^-1`` by factors that are made once, where they are first needed.

    Args:
        source: the samples that M is of. softmax: their probabilities, chunk by chunk.
    """

    def __init__(self, source: Factors, softmax: Remembered[Softmax], damping: float) -> None:
        self._source, self._softmax, self.damping = source, softmax, damping
        self._made: dict[tuple[str, torch.dtype], DampedCholesky] = {}
        self._weighted_norms: float | None = None

    @property
    def made(self) -> str | None:
        """ "primal" or "dual" where there is a factor, which makes every solve cheap."""
        return next(iter(self._made))[0] if self._made else None

    def weighted_norms(self) -> float:
        """``1/n sum_t c_t ||a~_t||^2``: at least the trace of the undamped M, twice its norm."""
        if self._weighted_norms is None:

            def norms(chunk: GradientFactors) -> Tensor:
                squares = chunk.act.double().square().sum(dim=1) + float(chunk.has_bias)
                return (self._softmax(chunk).scale / self._source.n * squares).sum()

            self._weighted_norms = float(self._source.sums(norms))
        return self._weighted_norms

    def approximates(self, solver: str) -> list[Approximate]:
        """In float32 where it can serve, then in float64."""
        direct = self.primal if solver == "primal" else self.dual
        wide: list[Approximate] = [lambda r, _: (direct(r), 0)]
        # Beyond 1/eps a float32 factor is noise.
        norm = 0.5 * self.weighted_norms()
        if self.damping < 16 * torch.finfo(torch.float32).eps * norm:
            return wide

        def in_float32(r: Tensor, _: float) -> tuple[Tensor, int]:
            try:
                return direct(r.float()), 0
            except SingularMatrixError:
                return torch.zeros_like(r), 0

        return [in_float32, *wide]

    def _operands(
        self, chunk: GradientFactors, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p [N, C], ``c_t / n`` [N] and a~ [N, D]."""
        found = self._softmax(chunk)
        a = augmented(chunk.act, chunk.has_bias, dtype)
        return found.p.to(dtype), (found.scale / self._source.n).to(dtype), a

    def _whole(self) -> GradientFactors:
        return in_memory(self._source, "solver='dual'")

    def _matrix(self, solver: str, dtype: torch.dtype) -> Tensor:
        if solver == "dual":
            return dual_matrix(*self._operands(self._whole(), dtype))
        return self._source.sums(lambda chunk: primal_matrix(*self._operands(chunk, dtype)))

    def _factor(self, solver: str, dtype: torch.dtype) -> DampedCholesky:
        if (solver, dtype) not in self._made:
            matrix = self._matrix(solver, dtype)
            try:
                factor = damped_cholesky(matrix, self.damping, overwrite=True)
            except SingularMatrixError as error:
                raise SingularMatrixError(
                    f"the GGN at damping={self.damping:g} is not positive definite in {dtype} "
                    f"(pivot {error.pivot} of {len(matrix)}); raise the damping, or take "
                    "solver='cg'",
                    pivot=error.pivot,
                ) from error
            self._made[solver, dtype] = factor
        return self._made[solver, dtype]

    def primal(self, r: Tensor) -> Tensor:
        """Between the contrasts by the factor; the mean over the classes meets lam alone."""
        mean = r.mean(dim=1, keepdim=True) / self.damping
        if r.shape[1] == 1:
            return mean
        basis = contrasts(r.shape[1]).to(r)
        between = (basis.t() @ r).flatten(1)
        x = self._factor("primal", r.dtype).solve(between.t()).t()
        return (basis @ x.reshape(len(r), -1, r.shape[2])).add_(mean)

    def dual(self, r: Tensor) -> Tensor:
        """Woodbury: ``(r - J^T (J J^T + lam I)^-1 J r) / lam``."""
        p, weight, a = self._operands(self._whole(), r.dtype)
        root, tokens = p.sqrt() * weight.sqrt()[:, None], p.shape[0]
        u = torch.einsum("td,kcd->ktc", a, r)
        jr = root * (u - (u * p).sum(dim=-1, keepdim=True))
        alpha = self._factor("dual", r.dtype).solve(jr.flatten(1).t().contiguous())
        s = root * alpha.t().reshape(-1, *p.shape)
        # S alpha = sqrt(p) alpha - p (sqrt(p) . alpha); root carries sqrt(c/n) already.
        s = s - p * s.sum(dim=-1, keepdim=True)
        out = r.clone()
        for one, signal in zip(out, s.reshape(-1, tokens, p.shape[1]), strict=True):
            add_gradients(one, signal, a, False, beta=1.0, alpha=-1.0)
        return out / self.damping

    def self_influence(self, factors: Factors) -> Tensor:
        """``||U^-T g_i||^2`` of every sample, ``M = U^T U`` between the contrasts of the classes.

        What is constant over the classes, C times their mean gradient, is divided by lam.
        """

        def squares(chunk: GradientFactors) -> Tensor:
            wide = chunk.to(dtype=torch.float64)
            mean = replace(wide, delta=wide.delta.mean(dim=1, keepdim=True))
            scale = wide.num_classes / self.damping
            parts = [g.square().sum(dim=(1, 2)) for _, g in gradient_slabs(mean)]
            out = torch.cat(parts) * scale
            if wide.num_classes > 1:
                upper = self._factor("primal", torch.float64).factor
                basis = contrasts(wide.num_classes).to(wide.delta)
                between = replace(wide, delta=wide.delta @ basis)
                for samples, g in gradient_slabs(between, _HALVES):
                    # Column-major on both sides: neither is copied, and rows of the result are
                    # whole.
                    rows = g.flatten(1).t()
                    half = torch.linalg.solve_triangular(upper.t(), rows, upper=False)
                    out[samples] += torch.linalg.vector_norm(half.t(), dim=1).square_()
            return out.to(chunk.delta)

        return factors.each(squares)

    def backward_error(self) -> float:
        """An upper bound on the relative residual of a solve by the float64 factor of M.

        What is factored and solved is ``M + E``. Rounding of N summands, each a covariance of
        2 C roundings, leaves ``||E||_F <= (N + 2 C) eps sum_t w_t ||a~_t||^2``, for probabilities
        sum to one; the factor and its solves leave ``3 P eps tr(M)`` (Higham 2002, theorem 10.4,
        and ``|| |U^T| |U| ||_F <= tr(U^T U)``), the change of basis 2 C eps ||M||. And
        ``||E x|| <= ||E|| ||v|| / lam``.
        """
        source = self._source
        classes, order = source.num_classes, source.num_classes * source.width
        # At least the trace of M.
        size = self.weighted_norms() + order * self.damping
        length = source.num_tokens + 3 * order + 4 * classes
        return length * torch.finfo(torch.float64).eps * size / self.damping
