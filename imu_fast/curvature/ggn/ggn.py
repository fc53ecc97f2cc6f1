"""The generalised Gauss-Newton matrix of a softmax head, which is the Hessian of its mean loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature, Fitted, gradient_slabs, self_influence
from imu_fast.curvature.ggn.costs import (
    MAX_DENSE_ORDER,
    choose_preconditioner,
    choose_solver,
    kfac_cost,
    solver_costs,
)
from imu_fast.curvature.ggn.dense import contrasts, dual_matrix, primal_matrix
from imu_fast.curvature.ggn.nystrom import NystromPreconditioner
from imu_fast.curvature.kfac import KroneckerEigenbasis, fit_kfac
from imu_fast.errors import (
    InputError,
    SingularMatrixError,
    check_finite_rows,
    check_positive,
    one_of,
)
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented, probabilities
from imu_fast.ops.ggn_product import ggn_product
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.options import option, options
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky
from imu_fast.solvers.conjugate_gradient import Approximate, Operator, conjugate_gradient, refine

logger = logging.getLogger("imu_fast")

Solver = Literal["auto", "primal", "dual", "cg"]
Preconditioner = Literal["auto", "none", "kfac", "nystrom"]
# What K-FAC leaves to do: measured 18 to 40 on heads of 51,300 parameters.
_KFAC_ITERATIONS = 20
# From this iteration on the rate of convergence is taken for known.
_FIRST_GUESS = 8
# From this many right-hand sides on, a float64 factor and the bound that it comes with are cheaper
# than a float32 one and the two float64 products of N P each that certify it.
_MANY = 32
# Elements of the per-sample gradients that self-influence solves for at once: in cache.
_HALVES = 1 << 20
# How deep conjugate gradient goes in a precision that cannot reach what is asked for: deeper digits
# come cheaper from the next refinement round.
_ROUND = 1e-3


def _norms(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)


def _depth(goal: float, dtype: torch.dtype) -> float:
    """The recurrence's tolerance for a true relative residual of ``goal``, if dtype has it."""
    return goal / 2 if goal >= 8 * torch.finfo(dtype).eps else _ROUND


@options
class GGN(Curvature):
    """``1/n sum c (diag(p) - p p^T) (x) a~ a~^T + lam I``, solved exactly, with a certificate.

    Of a linear softmax head it is the Hessian of the mean loss.

    Attributes:
        damping: lam > 0, in units of squared gradients.
        solver: "primal" (damped Cholesky of size (C-1) D), "dual" (of size N C), "cg" (conjugate
            gradient), or "auto": the cheapest by :func:`solver_costs`.
        tolerance: of the true relative residual of a solve.
        preconditioner: of conjugate gradient: "none", "kfac" (from the moment that it pays, see
            :func:`kfac_cost`), "nystrom" (a randomised sketch of rank 32), or "auto", by
            :func:`choose_preconditioner`.
    """

    name = "ggn"
    damping: float = option(default=1e-2, check=check_positive)
    solver: Solver = option(default="auto", check=one_of(*get_args(Solver)))
    tolerance: float = option(default=1e-6, check=check_positive)
    preconditioner: Preconditioner = option(default="auto", check=one_of(*get_args(Preconditioner)))

    def fit(self, factors: GradientFactors) -> FittedGGN:
        """Of a softmax head; nothing is factored before the first solve.

        Raises:
            InputError: not a softmax head; a dense solver beyond MAX_DENSE_ORDER.
        """
        sizes = (factors.num_tokens, factors.num_classes, factors.width)
        if self.solver != "auto" and self.solver not in solver_costs(*sizes):
            tokens, classes, width = sizes
            order = (classes - 1) * width if self.solver == "primal" else tokens * classes
            raise InputError(
                f"solver={self.solver!r} needs a dense matrix of order {order}; use 'cg' beyond "
                f"{MAX_DENSE_ORDER}"
            )
        chosen: str = self.preconditioner
        if chosen == "auto":
            chosen = choose_preconditioner(*sizes)
        return FittedGGN(factors, self.damping, self.solver, self.tolerance, chosen)


class FittedGGN(Fitted):
    """The GGN of a softmax head.

    Attributes:
        residual: relative residual of the last solve, recomputed in float64 (the largest of
            several right-hand sides); of many at once by a float64 factor, an upper bound.
        iterations: conjugate-gradient iterations of the last solve.
        solver: "primal", "dual" or "cg"; where it is "auto" each call of ``solve`` takes the
            cheapest for its number of right-hand sides.
        preconditioner: "none", "kfac" or "nystrom".
    """

    def __init__(
        self,
        factors: GradientFactors,
        damping: float,
        solver: str,
        tolerance: float,
        preconditioner: str,
    ) -> None:
        self.p, self.scale = probabilities(factors)
        # Conjugate gradient reads them at every product, on a CPU class by class.
        self._p32 = self.p.float() if solver in ("auto", "cg") else self.p
        if self.p.device.type == "cpu":
            self._p32 = self._p32.t().contiguous().t()
        self._factors = factors
        self.act, self.n, self.has_bias = factors.act, factors.n, factors.has_bias
        self.damping, self.solver, self.tolerance = damping, solver, tolerance
        self.preconditioner = preconditioner
        self.iterations = 0
        self._choleskys: dict[tuple[str, torch.dtype], DampedCholesky] = {}
        self._precondition: Operator | None = None

    def product(self, v: Tensor) -> Tensor:
        """``M v``; v [C, D] or [m, C, D], in v's dtype."""
        p = self._p32 if v.dtype == torch.float32 else self.p
        return ggn_product(p, self.scale, self.act, v, self.n, self.damping, self.has_bias)

    def _conjugate_gradient(
        self,
        r: Tensor,
        goal: float,
        give_up: Callable[[int, float], bool] | None = None,
        plain: bool = False,
    ) -> tuple[Tensor, int]:
        """About ``M^-1 r`` for the k rows of r [k, C, D], in r's dtype."""
        # In exact arithmetic P iterations suffice; rounding may ask for a few times more.
        limit = 4 * r[0].numel() + 10
        return conjugate_gradient(
            self.product,
            r,
            tolerance=_depth(goal, r.dtype),
            max_iterations=limit,
            precondition=None if plain else self._preconditioner(),
            give_up=give_up,
        )

    def _plain_first(self) -> Approximate:
        """In float32: K-FAC once it is likely to pay, which only the first iterations tell.

        (Measured: it saves from nothing to 25x.) At the mean rate so far what is left of this round
        is compared with making K-FAC and the iterations that it leaves.
        """
        plain = self._precondition is None
        cost = kfac_cost(len(self.act), self.p.shape[1], self._factors.width)

        def solve(r: Tensor, goal: float) -> tuple[Tensor, int]:
            r, depth = r.float(), -math.log(_depth(goal, torch.float32))

            def slow(iterations: int, ahead: float) -> bool:
                nonlocal plain
                if iterations < _FIRST_GUESS:
                    return False
                left, gained = math.log(ahead), max(depth - math.log(ahead), 1e-3)
                # Twice the cost: the rate usually rises as the iteration goes on.
                most = _KFAC_ITERATIONS + 2 * cost / len(r)
                plain = iterations * left / gained <= most
                return not plain

            if not plain:
                return self._conjugate_gradient(r, goal)
            x, products = self._conjugate_gradient(r, goal, give_up=slow, plain=True)
            if plain:
                return x, products
            rest = r - self.product(x)
            largest = max(goal, float(_norms(rest).max()))
            correction, more = self._conjugate_gradient(rest, goal / largest)
            return x + correction, products + len(r) + more

        return solve

    def _approximates(self, solver: str) -> list[Approximate]:
        """In float32 where it can serve, then in float64, which takes over where that stalls."""
        if solver == "cg":
            kfac = self.preconditioner == "kfac"
            if kfac:
                return [self._plain_first(), self._conjugate_gradient]
            return [lambda r, g: self._conjugate_gradient(r.float(), g), self._conjugate_gradient]
        direct = self._primal if solver == "primal" else self._dual
        wide: list[Approximate] = [lambda r, _: (direct(r), 0)]
        # ||M|| is at most half the largest ||a~||^2: beyond 1/eps a float32 factor is noise.
        norm = 0.5 * (float(self.act.square().sum(dim=1).max()) + 1) if len(self.act) else 0.0
        if self.damping < 16 * torch.finfo(torch.float32).eps * norm:
            return wide

        def in_float32(r: Tensor, _: float) -> tuple[Tensor, int]:
            try:
                return direct(r.float()), 0
            except SingularMatrixError:
                return torch.zeros_like(r), 0

        return [in_float32, *wide]

    def _preconditioner(self) -> Operator | None:
        if self._precondition is None and self.preconditioner == "kfac":
            kfac = self._kfac()
            self._precondition = lambda r: kfac.apply_inverse(r.to(kfac.damped)).to(r)
        elif self._precondition is None and self.preconditioner == "nystrom":
            shape = (self.p.shape[1], self._factors.width)
            self._precondition = NystromPreconditioner.fit(
                lambda v: self.product(v) - self.damping * v, shape, self.damping, self.act
            )
        return self._precondition

    def _kfac(self) -> KroneckerEigenbasis:
        """In float32, unless the rounding of its eigenvalues would swamp the damping there."""
        try:
            kfac = fit_kfac(self._factors, self.damping, torch.float32)
            noise = 16 * torch.finfo(torch.float32).eps * float(kfac.damped.max())
            if self.damping >= noise:
                return kfac
        except torch.linalg.LinAlgError:  # squares beyond float32's range
            pass
        return fit_kfac(self._factors, self.damping)

    def _dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        a = augmented(self.act, self.has_bias, dtype)
        return self.p.to(dtype), (self.scale / self.n).to(dtype), a

    def _factor(self, solver: str, dtype: torch.dtype) -> DampedCholesky:
        if (solver, dtype) not in self._choleskys:
            build = primal_matrix if solver == "primal" else dual_matrix
            matrix = build(*self._dense(dtype))
            try:
                factor = damped_cholesky(matrix, self.damping, overwrite=True)
            except SingularMatrixError as error:
                raise SingularMatrixError(
                    f"the GGN at damping={self.damping:g} is not positive definite in {dtype} "
                    f"(pivot {error.pivot} of {len(matrix)}); raise the damping, or take "
                    "solver='cg'",
                    pivot=error.pivot,
                ) from error
            self._choleskys[solver, dtype] = factor
        return self._choleskys[solver, dtype]

    def _primal(self, r: Tensor) -> Tensor:
        """Between the contrasts by the factor; the mean over the classes meets lam alone."""
        mean = r.mean(dim=1, keepdim=True) / self.damping
        if r.shape[1] == 1:
            return mean
        basis = contrasts(r.shape[1]).to(r)
        between = (basis.t() @ r).flatten(1)
        x = self._factor("primal", r.dtype).solve(between.t()).t()
        return (basis @ x.reshape(len(r), -1, r.shape[2])).add_(mean)

    def _dual(self, r: Tensor) -> Tensor:
        """Woodbury: ``(r - J^T (J J^T + lam I)^-1 J r) / lam``."""
        p, weight, a = self._dense(r.dtype)
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

    def _choose(self, solves: int) -> str:
        if self.solver != "auto":
            return self.solver
        if self._choleskys:  # a factor that is there makes every solve cheap
            return next(iter(self._choleskys))[0]
        return choose_solver(len(self.act), self.p.shape[1], self._factors.width, solves)

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v [C, D] or [m, C, D]. X is float64 (``out`` is not used).

        A residual above the tolerance is logged, and always to be read in ``residual``.

        Raises:
            InputError: v is not finite.
            SingularMatrixError: M is not positive definite in float64.
        """
        many = v if v.dim() == 3 else v[None]
        check_finite_rows("right-hand side", many, "vector")
        if not len(self.act):
            self.residual, self.iterations = 0.0, 0
            return v.double() / self.damping
        solver = self._choose(len(many))
        if solver == "primal" and len(many) >= _MANY:
            bound = self._backward_error()
            if bound <= self.tolerance:
                self.residual, self.iterations = bound, 0
                return self._primal(many.double())
        approximates = self._approximates(solver)
        solution = refine(self.product, approximates, many, tolerance=self.tolerance)
        self.residual, self.iterations = solution.residual, solution.iterations
        if self.residual > self.tolerance:
            logger.warning(
                "ggn: relative residual %.2g is above the tolerance %.2g at damping %g",
                self.residual,
                self.tolerance,
                self.damping,
            )
        return solution.x if v.dim() == 3 else solution.x[0]

    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; ``||U^-T g_i||^2`` where ``M = U^T U`` is dense.

        Between the contrasts of the classes; their mean is divided by lam.
        """
        bound = self._backward_error()
        if self._choose(factors.n) != "primal" or bound > self.tolerance:
            values, self.residual = self_influence(self, factors)
            return values
        wide = factors.to(dtype=torch.float64)
        # What is constant over the classes: C times their mean gradient, squared.
        mean = replace(wide, delta=wide.delta.mean(dim=1, keepdim=True))
        scale = wide.num_classes / self.damping
        out = torch.cat([g.square().sum(dim=(1, 2)) for _, g in gradient_slabs(mean)]) * scale
        if wide.num_classes > 1:
            upper = self._factor("primal", torch.float64).factor
            between = replace(wide, delta=wide.delta @ contrasts(wide.num_classes).to(wide.delta))
            for samples, g in gradient_slabs(between, _HALVES):
                # Column-major on both sides: neither is copied, and rows of the result are whole.
                half = torch.linalg.solve_triangular(upper.t(), g.flatten(1).t(), upper=False)
                out[samples] += torch.linalg.vector_norm(half.t(), dim=1).square_()
        self.residual, self.iterations = bound, 0
        return out.to(factors.delta)

    def _backward_error(self) -> float:
        """An upper bound on the relative residual of a solve by the float64 factor of M.

        What is factored and solved is ``M + E``. Rounding of N summands, each a covariance of
        2 C roundings, leaves ``||E||_F <= (N + 2 C) eps sum_t w_t ||a~_t||^2``, for probabilities
        sum to one; the factor and its solves leave ``3 P eps tr(M)`` (Higham 2002, theorem 10.4,
        and ``|| |U^T| |U| ||_F <= tr(U^T U)``), the change of basis 2 C eps ||M||. And
        ``||E x|| <= ||E|| ||v|| / lam``.
        """
        a2 = self.act.double().square().sum(dim=1) + float(self.has_bias)
        classes, order = self.p.shape[1], self.p.shape[1] * self._factors.width
        # At least the trace of M.
        size = float((self.scale / self.n * a2).sum()) + order * self.damping
        length = len(self.act) + 3 * order + 4 * classes
        return length * torch.finfo(torch.float64).eps * size / self.damping
