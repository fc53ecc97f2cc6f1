"""The GGN solved by a damped Cholesky factor: of the matrix itself, or of its dual."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.curvature.ggn.costs import dense_orders
from imu_fast.curvature.ggn.dense import contrasts, dual_blocks, primal_blocks
from imu_fast.curvature.gradients import gradient_slabs
from imu_fast.errors import SingularMatrixError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented
from imu_fast.factors.source import Factors, Remembered, in_memory
from imu_fast.losses.output_curvature import OutputCurvature
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky
from imu_fast.solvers.conjugate_gradient import Approximate

# Elements of the per-sample gradients that self-influence solves for at once: in cache.
_HALVES = 1 << 20


class Direct:
    """``M^-1`` by factors that are made once, where they are first needed.

    Args:
        source: the samples that M is of. outputs: the curvature of their loss, chunk by chunk.
        form: of that.

    Attributes:
        made: "primal" or "dual", once there is a factor, which makes every solve cheap; of what
            was loaded, once there was.
    """

    def __init__(
        self, source: Factors, outputs: Remembered[OutputCurvature], form: str, damping: float
    ) -> None:
        self._source, self._outputs, self.damping = source, outputs, damping
        self._softmax = form == "softmax"
        sizes = source.num_tokens, source.num_classes, source.width
        self._blocks = dense_orders(*sizes, form)["primal"][0]
        self._roots: dict[torch.dtype, Tensor] = {}
        self._made: dict[tuple[str, torch.dtype], DampedCholesky] = {}
        self.made: str | None = None
        self._weighted_norms: float | None = None
        self._all: GradientFactors | None = None

    def weighted_norms(self) -> float:
        """``1/n sum_t size_t ||a~_t||^2``: at least the trace of the undamped M, twice its norm."""
        if self._weighted_norms is None:

            def norms(chunk: GradientFactors) -> Tensor:
                squares = chunk.act.double().square().sum(dim=1) + float(chunk.has_bias)
                return (self._outputs(chunk).size() / self._source.n * squares).sum()

            self._weighted_norms = float(self._source.sums(norms))
        return self._weighted_norms

    def goal(self, tolerance: float) -> float:
        """A residual that leaves an error of 1e-6, up to M's condition: one more cheap round.

        Not below 1e-10, which refinement reaches before float64's rounding ends it.
        """
        condition = 0.5 * self.weighted_norms() / self.damping + 1
        return min(tolerance, max(1e-6 / condition, 1e-10))

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

    def _whole(self) -> GradientFactors:
        if self._all is None:
            self._all = in_memory(self._source, "solver='dual'")
        return self._all

    def _features(self, chunk: GradientFactors, dtype: torch.dtype) -> Tensor:
        return augmented(chunk.act, chunk.has_bias, dtype)

    def _root(self, dtype: torch.dtype) -> Tensor:
        """``S_t / sqrt(n)``."""
        if dtype not in self._roots:
            root = self._outputs(self._whole()).root() / self._source.n**0.5
            self._roots[dtype] = root.to(dtype)
        return self._roots[dtype]

    def _matrix(self, solver: str, dtype: torch.dtype) -> Tensor:
        if solver == "dual":
            return dual_blocks(self._root(dtype), self._features(self._whole(), dtype))
        n = self._source.n
        return self._source.sums(
            lambda chunk: primal_blocks(self._outputs(chunk), n, self._features(chunk, dtype))
        )

    def _factor(self, solver: str, dtype: torch.dtype) -> DampedCholesky:
        if (solver, dtype) not in self._made:
            matrix = self._matrix(solver, dtype)
            if self._blocks == 1:
                matrix = matrix.view(matrix.shape[-2:])
            try:
                factor = damped_cholesky(matrix, self.damping, overwrite=True)
            except SingularMatrixError as error:
                raise SingularMatrixError(
                    f"the GGN at damping={self.damping:g} is not positive definite in {dtype} "
                    f"(pivot {error.pivot} of {matrix.shape[-1]}); raise the damping, or take "
                    "solver='cg'",
                    pivot=error.pivot,
                ) from error
            self._made[solver, dtype] = factor
            self.made = self.made or solver
        return self._made[solver, dtype]

    def _columns(self, r: Tensor) -> Tensor:
        """Right-hand sides r [k, ...] of the blocks: [order, k], or [blocks, order, k]."""
        return r.flatten(1).t() if self._blocks == 1 else r.permute(1, 2, 0)

    def _rows(self, x: Tensor, like: Tensor) -> Tensor:
        return x.t().reshape(like.shape) if self._blocks == 1 else x.permute(2, 0, 1)

    def _solved(self, solver: str, r: Tensor) -> Tensor:
        return self._rows(self._factor(solver, r.dtype).solve(self._columns(r)), r)

    def primal(self, r: Tensor) -> Tensor:
        """By the factor; of a softmax between the contrasts: the mean over classes meets lam."""
        if not self._softmax:
            return self._solved("primal", r).contiguous()
        mean = r.mean(dim=1, keepdim=True) / self.damping
        if r.shape[1] == 1:
            return mean
        basis = contrasts(r.shape[1]).to(r)
        return (basis @ self._solved("primal", basis.t() @ r)).add_(mean)

    def dual(self, r: Tensor) -> Tensor:
        """Woodbury: ``(r - J^T (J J^T + lam I)^-1 J r) / lam``."""
        whole = self._whole()
        a, root = self._features(whole, r.dtype), self._root(r.dtype)
        u = torch.einsum("td,kcd->ktc", a, r)
        if root.dim() == 2:
            alpha = self._solved("dual", (u * root).mT).mT
            s = alpha * root
        else:
            alpha = self._solved("dual", torch.einsum("tcr,ktc->ktr", root, u))
            s = torch.einsum("tcr,ktr->ktc", root, alpha)
        out = r.clone()
        for one, signal in zip(out, s, strict=True):
            add_gradients(one, signal, a, False, beta=1.0, alpha=-1.0)
        return out / self.damping

    def self_influence(self, factors: Factors) -> Tensor:
        """``||U^-T g_i||^2`` of every sample, ``M = U^T U``; of a softmax between the contrasts.

        There what is constant over the classes, C times their mean gradient, is divided by lam.
        """

        def squares(chunk: GradientFactors) -> Tensor:
            wide = chunk.to(dtype=torch.float64)
            out = wide.delta.new_zeros(chunk.n)
            classes = wide.num_classes
            if self._softmax:
                mean = wide.with_delta(wide.delta.mean(dim=1, keepdim=True))
                parts = [g.square().sum(dim=(1, 2)) for _, g in gradient_slabs(mean)]
                out = torch.cat(parts) * (classes / self.damping)
                if classes == 1:
                    return out.to(chunk.delta)
                wide = wide.with_delta(wide.delta @ contrasts(classes).to(wide.delta))
            upper = self._factor("primal", torch.float64).factor
            for samples, g in gradient_slabs(wide, _HALVES):
                # Column-major on both sides: neither is copied, and rows of the result are whole.
                half = torch.linalg.solve_triangular(upper.mT, self._columns(g), upper=False)
                norms = torch.linalg.vector_norm(half.mT, dim=-1).square_()
                out[samples] += norms if norms.dim() == 1 else norms.sum(dim=0)
            return out.to(chunk.delta)

        return factors.each(squares)

    def backward_error(self) -> float:
        """An upper bound on the relative residual of a solve by the float64 factor of M.

        What is factored and solved is ``M + E``. Rounding of N summands, each a covariance of
        2 C roundings, leaves ``||E||_F <= (N + 2 C) eps sum_t size_t ||a~_t||^2`` (of a softmax
        size is the weight: probabilities sum to one); the factor and its solves leave
        ``3 P eps tr(M)`` (Higham 2002, theorem 10.4, and ``|| |U^T| |U| ||_F <= tr(U^T U)``), the
        change of basis 2 C eps ||M||. And ``||E x|| <= ||E|| ||v|| / lam``.
        """
        source = self._source
        classes, order = source.num_classes, source.num_classes * source.width
        # At least the trace of M.
        size = self.weighted_norms() + order * self.damping
        length = source.num_tokens + 3 * order + 4 * classes
        return length * torch.finfo(torch.float64).eps * size / self.damping
