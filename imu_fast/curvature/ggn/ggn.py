"""The generalised Gauss-Newton matrix of a head, which is the Hessian of its mean loss."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast import distributed
from imu_fast.curvature.base import Layer, Saved, self_influence
from imu_fast.curvature.gauss_newton import GaussNewton, signals_of, warn_of_rounding
from imu_fast.curvature.ggn.costs import (
    MAX_DENSE_ORDER,
    choose_preconditioner,
    choose_solver,
    dense_instead,
    dense_orders,
    solver_costs,
)
from imu_fast.curvature.ggn.direct import Direct
from imu_fast.curvature.ggn.iterative import Iterative
from imu_fast.curvature.ggn.refined import RefinedGGN
from imu_fast.curvature.ggn.signals import FittedSignalGGN
from imu_fast.errors import InputError, check_finite_rows, check_positive, one_of
from imu_fast.factors.chunked import pack_chunks, unpack_chunks
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import output_curvature
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.factors.source import Factors, Remembered
from imu_fast.factors.statistics import ggn_diagonal, trace
from imu_fast.losses.output_curvature import OutputCurvature, Softmax
from imu_fast.ops.ggn_product import Form, ggn_product
from imu_fast.options import option, options

Solver = Literal["auto", "primal", "dual", "cg"]
Preconditioner = Literal["auto", "none", "kfac", "nystrom"]
# From this many right-hand sides on, a float64 factor and the bound that it comes with are cheaper
# than a float32 one and the two float64 products of N P each that certify it.
_MANY = 32


@options
class GGN(GaussNewton):
    """``1/n sum_t B_t (x) a~_t a~_t^T + lam I``, solved exactly, with a certificate.

    B_t is the second derivative of a sample's loss in the outputs, ``diag(p) - p p^T`` of
    cross-entropy: of a linear head M is the Hessian of the mean loss. Of an inner layer M is its
    block of the whole network's GGN, ``1/n sum_ik g_ik g_ik^T`` over its signals' gradients.

    Attributes:
        damping, damping_mode: of lam: see :class:`Damped`.
        fisher: over whose labels: see :class:`imu_fast.curvature.gauss_newton.GaussNewton`.
        solver: "primal" (damped Cholesky of size (C-1) D), "dual" (of size N C, all factors in
            memory; both in C blocks where outputs do not meet in the loss; of inner layers of sizes
            C D and n times the signals), "cg" (conjugate gradient), or "auto": the cheapest by
            :func:`solver_costs`; conjugate gradient is left for a dense one where its first
            iterations show that it would take longer.
        tolerance: of the true relative residual of a solve.
        preconditioner: of conjugate gradient: "none", "kfac" (from the moment that it pays, see
            :func:`kfac_cost`), "nystrom" (a randomised sketch of rank 32), or "auto", by
            :func:`choose_preconditioner`.
    """

    name = "ggn"
    solver: Solver = option(default="auto", check=one_of(*get_args(Solver)))
    tolerance: float = option(default=1e-6, check=check_positive)
    preconditioner: Preconditioner = option(default="auto", check=one_of(*get_args(Preconditioner)))

    def fit(self, factors: Factors) -> FittedGGN | FittedSignalGGN:
        """Nothing is factored before the first solve.

        Raises:
            InputError: no curvature of the loss is known; a dense solver beyond MAX_DENSE_ORDER;
                lam relative to a mean that is zero or not finite.
        """
        factors = self.expected(factors)
        if (found := signals_of(factors)) is not None:
            return self._of_signals(factors, factors.n * found.s.shape[1])
        sizes = (factors.num_tokens, factors.num_classes, factors.width)
        outputs = Remembered(output_curvature)
        form = _form(factors, outputs)  # refused before any work
        if self.solver != "auto" and self.solver not in solver_costs(*sizes, form=form):
            blocks, order = dense_orders(*sizes, form)[self.solver]
            what = "a dense matrix" if blocks == 1 else f"{blocks} dense matrices"
            raise InputError(
                f"solver={self.solver!r} needs {what} of order {order}; use 'cg' beyond "
                f"{MAX_DENSE_ORDER}"
            )
        chosen: str = self.preconditioner
        if chosen == "auto":
            chosen = choose_preconditioner(*sizes)
        lam = self.absolute(factors, lambda: trace(factors))
        solve = (lam, self.solver, self.tolerance, chosen)
        return FittedGGN(factors, outputs, form, *solve)

    def _of_signals(self, factors: Factors, rank: int) -> FittedSignalGGN:
        """rank: at most that of the undamped matrix."""
        lam = self.absolute(factors, lambda: trace(factors))
        if rank < factors.num_classes * factors.width:
            warn_of_rounding(self.name, factors, lam, trace(factors) / rank, 0.0)
        return FittedSignalGGN(factors, lam, self.solver, self.tolerance, self.preconditioner)


def _form(factors: Factors, outputs: Remembered[OutputCurvature]) -> Form:
    """Of the loss's curvature, which is that of every chunk."""
    for chunk in factors.chunks():
        form: Form = outputs(chunk).form
        return form
    return "softmax"


def _by_class(p: Tensor) -> Tensor:
    """In float32; on a CPU class by class, as conjugate gradient reads them at every product."""
    p = p.float()
    return p.t().contiguous().t() if p.device.type == "cpu" and p.dim() == 2 else p


def _top(outputs: OutputCurvature) -> Tensor | None:
    return outputs.top() if isinstance(outputs, Softmax) else None


class FittedGGN(RefinedGGN):
    """The GGN of a head.

    Attributes:
        residual: relative residual of the last solve, recomputed in float64 (the largest of
            several right-hand sides); of many at once by a float64 factor, an upper bound.
        iterations: conjugate-gradient iterations of the last solve.
        solver: "primal", "dual" or "cg"; where it is "auto" each call of ``solve`` takes the
            cheapest for its number of right-hand sides.
        direct, iterative: the two ways to solve.
    """

    def __init__(
        self,
        factors: Factors,
        outputs: Remembered[OutputCurvature],
        form: Form,
        damping: float,
        solver: str,
        tolerance: float,
        preconditioner: str,
    ) -> None:
        super().__init__(GGN.name, Layer.of(factors), damping)
        self._factors, self._outputs, self._form = factors, outputs, form
        self._narrow = Remembered(lambda chunk: _by_class(outputs(chunk).operand))
        self._factor = Remembered(lambda chunk: outputs(chunk).factor())
        self._top = Remembered(lambda chunk: _top(outputs(chunk)))
        self.solver, self.tolerance = solver, tolerance
        self.iterations = 0
        self.direct = Direct(factors, outputs, form, damping)
        self.iterative = Iterative(self._product, factors, outputs, damping, preconditioner)

    @property
    def reads(self) -> Factors:
        """Those that M is of."""
        return self._factors

    def _product(self, v: Tensor) -> Tensor:
        n = self._factors.n

        def share(chunk: GradientFactors) -> Tensor:
            single = v.dtype == torch.float32
            p = self._narrow(chunk) if single else self._outputs(chunk).operand
            # Each chunk brings its share of the damping.
            damping, top = self.damping * (chunk.n / n), self._top(chunk)
            rest = (v, n, damping, chunk.has_bias, self._form, top)
            return ggn_product(p, self._factor(chunk), chunk.act, *rest)

        return self._factors.sums(share)

    def _choose(self, solves: int) -> str:
        if self.solver != "auto":
            return self.solver
        if self.direct.made:
            return self.direct.made
        f = self._factors
        sizes = (f.num_tokens, f.num_classes, f.width)
        if solver_costs(*sizes, solves, self._form).keys() == {"cg"}:
            return "cg"
        return choose_solver(*sizes, solves, form=self._form, stiffness=self._stiffness)

    def _instead(self, solves: int) -> tuple[str, float]:
        """What conjugate gradient may be left for, and after how many iterations."""
        f = self._factors
        if self.solver != "auto":
            return self.solver, math.inf
        return dense_instead(f.num_tokens, f.num_classes, f.width, solves, self._form)

    @cached_property
    def _stiffness(self) -> float:
        return trace(self._factors, self._outputs) / self.damping

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        many = v if v.dim() == 3 else v[None]
        check_finite_rows("right-hand side", many, "vector")
        if not self._factors.num_tokens:
            self.residual, self.iterations = 0.0, 0
            return v.double() / self.damping
        solver = self._choose(len(many))
        if solver == "primal" and len(many) >= _MANY:
            bound = self.direct.backward_error()
            if bound <= self.tolerance:
                self.residual, self.iterations = bound, 0
                return self.direct.primal(many.double())
        if solver == "cg":
            solver, most = self._instead(len(many))
            x = self._iterated(self.iterative, many, most)
            if x is not None:
                return x if v.dim() == 3 else x[0]
        goal = self.direct.goal(self.tolerance)
        x = self._refined(self.direct.approximates(solver), many, goal)
        return x if v.dim() == 3 else x[0]

    def _diagonal(self) -> Tensor:
        return ggn_diagonal(self._factors).add_(self.damping)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The way that is solved by depends on what was made for earlier solves."""
        tensors, options = pack_chunks(self._factors, "curvature='ggn'")
        options |= {"solver": self.solver, "tolerance": self.tolerance}
        options["preconditioner"] = self.iterative.preconditioner
        options["made"], options["pays"] = self.direct.made, self.iterative.pays
        return tensors, options

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        known, outputs = saved.options, Remembered(output_curvature)
        factors = unpack_chunks(saved.tensors, known, saved.layer.device)
        solve = {key: known[key] for key in ("solver", "tolerance", "preconditioner")}
        GGN(**solve)  # refuses what it does not have
        found = cls(factors, outputs, _form(factors, outputs), saved.damping, **solve)
        found.direct.made, found.iterative.pays = known["made"], known["pays"]
        return found

    def _self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; all at once where M is dense, else by one solve each.

        Processes that share M's samples make the solves of all of them in step.
        """
        bound, solves = self.direct.backward_error(), factors.n
        if isinstance(self.reads, ShardedFactors):
            solves = max(distributed.gather(solves, self.reads.group))
        if self._choose(solves) != "primal" or bound > self.tolerance:
            each, own = self._of_all(factors)
            values, self.residual = self_influence(self, each)
            return values[own]
        self.residual, self.iterations = bound, 0
        return self.direct.self_influence(factors)
