"""The generalised Gauss-Newton matrix of a softmax head, which is the Hessian of its mean loss."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_choice, check_positive
from imu_fast.factors import GradientFactors
from imu_fast.ops.ggn_product import ggn_product
from imu_fast.solvers.cholesky import DampedCholesky, damped_cholesky
from imu_fast.solvers.conjugate_gradient import Solution, conjugate_gradient, refine

logger = logging.getLogger("imu_fast")

SOLVERS = ("auto", "primal", "cg")
# Beyond this order the dense matrix is not an option: 8,192^2 float32 is 268 MB.
MAX_DENSE_ORDER = 8192
# What conjugate gradient is assumed to take: measured 2 to 117 on heads of 51,300 parameters.
ASSUMED_ITERATIONS = 60
# The inner solve in float32: deeper digits come cheaper from the next refinement round.
_INNER_TOLERANCE = 1e-3


def probabilities(factors: GradientFactors) -> tuple[Tensor, Tensor]:
    """Softmax probabilities [N, C] and ``c_t`` [N], out of ``delta = c (p - onehot(y))``.

    Raises:
        InputError: the factors are not of a softmax head.
    """
    if factors.labels is None:
        raise InputError(
            f"factors of layer {factors.name!r} are not of a softmax head, which the GGN and its "
            "relatives need; capture layers='head', or use 'fisher_diag'"
        )
    counts = factors.offsets.diff()
    per_token = torch.repeat_interleave(1 / counts.clamp_min(1).double(), counts)
    scale = per_token.to(factors.delta)
    p = factors.delta / scale[:, None]
    return p.index_put_(
        (torch.arange(len(p), device=p.device), factors.labels), p.new_ones(()), accumulate=True
    ), scale


def choose_solver(tokens: int, classes: int, width: int, solves: int = 1) -> str:
    """The cheaper of the two exact solvers, by FLOPs.

    ``primal``: building takes ``N C^2 D^2`` (half the class pairs, two operations each), factoring
    ``P^3 / 3`` and each solve ``2 P^2``, with P = C D at most ``MAX_DENSE_ORDER``. ``cg``: each
    solve takes ``ASSUMED_ITERATIONS`` products of ``4 N C D``.
    """
    order = classes * width
    if order > MAX_DENSE_ORDER:
        return "cg"
    primal = tokens * order**2 + order**3 / 3 + solves * 2 * order**2
    cg = solves * ASSUMED_ITERATIONS * 4 * tokens * order
    return "primal" if primal <= cg else "cg"


def ggn_matrix(p: Tensor, scale: Tensor, act: Tensor, n: int, has_bias: bool) -> Tensor:
    """The undamped GGN as a dense matrix [P, P], block by block of class pairs."""
    classes = p.shape[1]
    a = torch.cat([act, torch.ones_like(act[:, :1])], dim=1) if has_bias else act
    width = a.shape[1]
    out = act.new_empty(classes, width, classes, width)
    for c in range(classes):
        weighted = a * (scale * p[:, c] / n)[:, None]
        for e in range(c + 1):
            block = (weighted * (float(c == e) - p[:, e])[:, None]).t() @ a
            out[c, :, e], out[e, :, c] = block, block.t()
    return out.view(classes * width, classes * width)


class GGN:
    """``1/n sum c (diag(p) - p p^T) (x) a~ a~^T + lam I``, solved exactly, with a certificate.

    Attributes:
        residual: relative residual of the last solve, recomputed in float64 (the largest of
            several right-hand sides).
        iterations: conjugate-gradient iterations of the last solve.
        solver: "primal" or "cg".
    """

    def __init__(
        self, factors: GradientFactors, damping: float, solver: str, tolerance: float
    ) -> None:
        self.p, self.scale = probabilities(factors)
        self.act, self.n, self.has_bias = factors.act, factors.n, factors.has_bias
        self.damping, self.solver, self.tolerance = damping, solver, tolerance
        self.residual, self.iterations = 0.0, 0
        self._factor: DampedCholesky | None = None

    @classmethod
    def fit(
        cls,
        factors: GradientFactors,
        damping: float,
        solver: str = "auto",
        tolerance: float = 1e-6,
    ) -> GGN:
        """Fit on a softmax head's factors.

        Args:
            solver: ``"primal"`` (damped Cholesky of size P), ``"cg"``, or the cheaper one.
            tolerance: on the true relative residual.

        Raises:
            InputError: not a softmax head; a bad option; ``"primal"`` beyond MAX_DENSE_ORDER.
        """
        check_choice("solver", solver, SOLVERS)
        check_positive("tolerance", tolerance)
        order = factors.num_classes * factors.width
        if solver == "primal" and order > MAX_DENSE_ORDER:
            raise InputError(
                f"solver='primal' with P={order} parameters needs a [P, P] matrix; use 'cg' beyond "
                f"{MAX_DENSE_ORDER}"
            )
        if solver == "auto":
            solver = choose_solver(factors.num_tokens, factors.num_classes, factors.width)
        return cls(factors, damping, solver, tolerance)

    def product(self, v: Tensor) -> Tensor:
        """``M v``: [C, D] in v's dtype."""
        return ggn_product(self.p, self.scale, self.act, v, self.n, self.damping, self.has_bias)

    def _approximate(self, r: Tensor) -> tuple[Tensor, int]:
        if self.solver == "cg":
            # In exact arithmetic P iterations suffice; rounding may ask for a few times more.
            limit = 4 * r.numel() + 10
            return conjugate_gradient(
                self.product, r, tolerance=_INNER_TOLERANCE, max_iterations=limit
            )
        if self._factor is None:
            # In float64: a float32 factor fails where the condition number passes 1e7.
            matrix = ggn_matrix(
                self.p.double(), self.scale.double(), self.act.double(), self.n, self.has_bias
            )
            self._factor = damped_cholesky(matrix, self.damping)
        return self._factor.solve(r.double().flatten()).view_as(r), 0

    def _solve_one(self, v: Tensor) -> Solution:
        return refine(self.product, self._approximate, v, tolerance=self.tolerance)

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v [C, D] or [m, C, D]. X is float64 (``out`` is not used).

        A residual above the tolerance is logged, and always to be read in ``residual``.
        """
        solutions = [self._solve_one(one) for one in (v if v.dim() == 3 else v[None])]
        self.residual = max(s.residual for s in solutions)
        self.iterations = sum(s.iterations for s in solutions)
        if self.residual > self.tolerance:
            logger.warning(
                "ggn: relative residual %.2g is above the tolerance %.2g at damping %g",
                self.residual,
                self.tolerance,
                self.damping,
            )
        x = torch.stack([s.x for s in solutions])
        return x if v.dim() == 3 else x[0]

    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; one solve per sample."""
        out = factors.delta.new_empty(factors.n)
        worst = 0.0
        for i in range(factors.n):
            g = factors.select(torch.tensor([i])).mean_gradient()
            out[i] = (self.solve(g) * g).sum()
            worst = max(worst, self.residual)
        self.residual = worst
        return out
