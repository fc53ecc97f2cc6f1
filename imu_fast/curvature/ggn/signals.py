"""The Gauss-Newton matrix of an inner layer, from the signals that make it, solved exactly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Layer, Saved, self_influence
from imu_fast.curvature.gauss_newton import signal_gradients
from imu_fast.curvature.ggn.costs import (
    ASSUMED_ITERATIONS,
    MAX_DENSE_ORDER,
    choose_preconditioner,
)
from imu_fast.curvature.ggn.iterative import Iterative
from imu_fast.curvature.ggn.refined import RefinedGGN
from imu_fast.errors import InputError, check_finite_rows
from imu_fast.factors.chunked import pack_chunks, unpack_chunks
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import pseudo_samples, signals_or_curvature
from imu_fast.factors.source import Factors, Remembered, in_memory, may_be_in_memory
from imu_fast.factors.statistics import ggn_diagonal
from imu_fast.losses.signals import Signals
from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.ops.gram import gram
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.tokens import sample_of_token
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky


def _signals(chunk: GradientFactors) -> Signals:
    found = chunk.curvature
    assert isinstance(found, Signals)
    return found


class FittedSignalGGN(RefinedGGN):
    """``1/n sum_ik g_ik g_ik^T + lam I``, in float64.

    Args:
        source: factors whose chunks have K signals of each row.

    Attributes:
        residual: relative residual of the last solve, recomputed in float64 (the largest of
            several right-hand sides). iterations: conjugate-gradient iterations of it.
        solver: "primal" (order P), "dual" (order n K, all factors in memory) or "cg"; where it is
            "auto" each solve takes the cheapest.
    """

    def __init__(
        self, source: Factors, damping: float, solver: str, tolerance: float, preconditioner: str
    ) -> None:
        super().__init__("ggn", Layer.of(source), damping)
        self._source, self.solver, self.tolerance = source, solver, tolerance
        first = next(iter(source.chunks()))
        self._k = _signals(first).s.shape[1]
        sizes = (source.num_tokens, source.num_classes, source.width)
        self.preconditioner = preconditioner
        chosen = choose_preconditioner(*sizes) if preconditioner == "auto" else preconditioner
        self.iterations = 0
        self._made: dict[str, DampedCholesky] = {}
        self._pseudo: GradientFactors | None = None
        outputs = Remembered(signals_or_curvature)
        self._iterative = Iterative(self._product, source, outputs, damping, chosen)
        if solver in self._orders() and self._orders()[solver] > MAX_DENSE_ORDER:
            raise InputError(
                f"solver={solver!r} needs a dense matrix of order {self._orders()[solver]}; use "
                f"'cg' beyond {MAX_DENSE_ORDER}"
            )

    @property
    def reads(self) -> Factors:
        """Those that M is of."""
        return self._source

    def _orders(self) -> dict[str, int]:
        f = self._source
        return {"primal": f.num_classes * f.width, "dual": f.n * self._k}

    def _choose(self, solves: int) -> str:
        """The cheapest, by floating-point operations."""
        if self.solver != "auto":
            return self.solver
        if self._made:
            return next(iter(self._made))
        costs = self._costs(solves)
        return min(costs, key=lambda name: costs[name])

    def _instead(self, solves: int) -> tuple[str, float]:
        """What conjugate gradient may be left for, and after how many iterations."""
        costs = self._costs(solves)
        one = costs.pop("cg") / ASSUMED_ITERATIONS
        if self.solver != "auto" or not costs:
            return self.solver, math.inf
        best = min(costs, key=lambda name: costs[name])
        return best, costs[best] / one

    def _costs(self, solves: int) -> dict[str, float]:
        f, orders = self._source, self._orders()
        order, rank, rows = orders["primal"], orders["dual"], f.num_tokens * self._k
        product = 4 * rows * order
        costs = {"cg": float(ASSUMED_ITERATIONS * solves * product)}
        if order <= MAX_DENSE_ORDER:
            costs["primal"] = 2 * rank * order**2 + order**3 / 3 + 2 * solves * order**2
        if rank <= MAX_DENSE_ORDER and may_be_in_memory(f, self._k):
            pairs = 2 * rows**2 * (f.num_classes + f.width)
            costs["dual"] = pairs + rank**3 / 3 + solves * (2 * rank**2 + product)
        return costs

    def _product(self, v: Tensor) -> Tensor:
        many = (v if v.dim() == 3 else v[None]).double()

        def share(chunk: GradientFactors) -> Tensor:
            out = many * (self.damping * chunk.n / self._source.n)
            for one in pseudo_samples(chunk, _signals(chunk)):
                add_outer(out, one, forward(one, many), 1 / self._source.n)
            return out

        return self._source.sums(share).view_as(v).to(v.dtype)

    def _factors(self) -> GradientFactors:
        """All n K pseudo-samples, float64."""
        if self._pseudo is None:
            whole = in_memory(self._source, "solver='dual'")
            parts = list(pseudo_samples(whole, _signals(whole)))
            counts = whole.offsets.diff().repeat(self._k)
            self._pseudo = GradientFactors(
                torch.cat([part.delta for part in parts]),
                torch.cat([part.act for part in parts]),
                torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
                whole.has_bias,
            )
        return self._pseudo

    def _cholesky(self, solver: str) -> DampedCholesky:
        if solver not in self._made:
            n = self._source.n
            if solver == "dual":
                f = self._factors()
                matrix = gram(f.delta, f.act, f.offsets, f.has_bias).div_(n)
            else:
                order = self._orders()["primal"]

                def sums(chunk: GradientFactors) -> Tensor:
                    out = chunk.act.new_zeros(order, order, dtype=torch.float64)
                    for g in signal_gradients(chunk):
                        out.addmm_(g.flatten(1).T, g.flatten(1))
                    return out.div_(n)

                matrix = self._source.sums(sums)
            self._made[solver] = damped_cholesky(matrix, self.damping, overwrite=True)
        return self._made[solver]

    def _primal(self, r: Tensor, _: float) -> tuple[Tensor, int]:
        return self._cholesky("primal").solve(r.flatten(1).T).T.reshape(r.shape), 0

    def _dual(self, r: Tensor, _: float) -> tuple[Tensor, int]:
        """Woodbury."""
        f = self._factors()
        alpha = self._cholesky("dual").solve(forward(f, r))
        return add_outer(r.clone(), f, alpha, -1 / self._source.n).div_(self.damping), 0

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        many = v if v.dim() == 3 else v[None]
        check_finite_rows("right-hand side", many, "vector")
        solver = self._choose(len(many))
        ways = {"primal": [self._primal], "dual": [self._dual]}
        if solver == "cg":
            solver, most = self._instead(len(many))
            x = self._iterated(self._iterative, many, most)
            if x is not None:
                return x if v.dim() == 3 else x[0]
        x = self._refined(ways[solver], many, self.tolerance)
        return x if v.dim() == 3 else x[0]

    def _diagonal(self) -> Tensor:
        return ggn_diagonal(self._source).add_(self.damping)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, known = pack_chunks(self._source, "curvature='ggn'")
        solver = self.solver
        if self._made and solver == "auto":  # what is loaded solves as this does
            solver = next(iter(self._made))
        known |= {"solver": solver, "tolerance": self.tolerance, "pays": self._iterative.pays}
        return tensors, known | {"preconditioner": self.preconditioner, "signals": True}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        known = saved.options
        source = unpack_chunks(saved.tensors, known, saved.layer.device)
        solve = (known[key] for key in ("solver", "tolerance", "preconditioner"))
        found = cls(source, saved.damping, *solve)
        found._iterative.pays = known["pays"]
        return found

    def _self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; by one solve each."""
        each, own = self._of_all(factors)
        values, self.residual = self_influence(self, each)
        return values[own]


def forward(f: GradientFactors, v: Tensor) -> Tensor:
    """``<g_i, V_j>``: [n, m] for v [m, C, D], in f's dtype."""
    return bilinear_scores(f.delta, f.act, v.to(f.dtype), f.offsets, f.has_bias)


def add_outer(out: Tensor, f: GradientFactors, alpha: Tensor, scale: float) -> Tensor:
    """``out + scale G^T alpha``, in place: out [m, C, D], alpha [n, m]."""
    of_token = sample_of_token(f.offsets, f.device)
    for one, column in zip(out, alpha.t(), strict=True):
        weighted = f.delta * column[of_token, None]
        add_gradients(one, weighted, f.act, f.has_bias, beta=1.0, alpha=scale)
    return out
