"""The GGN solved by conjugate gradient, with a preconditioner where one pays."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from imu_fast.curvature.ggn.costs import kfac_applied, kfac_cost
from imu_fast.curvature.ggn.nystrom import NystromPreconditioner
from imu_fast.curvature.kfac import fit_kfac
from imu_fast.curvature.kronecker import KroneckerEigenbasis
from imu_fast.factors.probabilities import Outputs
from imu_fast.factors.source import Factors
from imu_fast.solvers.conjugate_gradient import Approximate, Operator, conjugate_gradient

# What K-FAC leaves to do: measured 18 to 40 on heads of 51,300 parameters.
_KFAC_ITERATIONS = 20
# From this iteration on the rate of convergence is taken for known.
_FIRST_GUESS = 8
# Without any progress so far, so many times as many iterations may be to come: stiff systems stand
# still at first (measured: for 8 to 48 iterations, of 40 to 430), so that a rate of next to nothing
# says little.
_STUCK = 16
# How deep conjugate gradient goes in a precision that cannot reach what is asked for: deeper digits
# come cheaper from the next refinement round.
_ROUND = 1e-3


class DearerError(Exception):
    """At the rate so far conjugate gradient would take longer than a dense factor."""


def _norms(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)


def _ahead(goal: float) -> float:
    """The factor that a round in float32 reduces a residual of one by."""
    return 1 / _depth(goal, torch.float32)


def _depth(goal: float, dtype: torch.dtype) -> float:
    """The recurrence's tolerance for a true relative residual of ``goal``, if dtype has it."""
    return goal / 2 if goal >= 8 * torch.finfo(dtype).eps else _ROUND


def _left(iterations: int, ahead: float, depth: float) -> float:
    """Iterations still to do at the mean rate of those that are done.

    Args:
        ahead: the factor that the residual is still to be reduced by. depth: that of them all.
    """
    left = math.log(ahead)
    return iterations * left / max(math.log(depth) - left, 1e-3)


def _in_time(depth: float, most: float, each: float = 1.0) -> Callable[[int, float], bool]:
    """A ``give_up`` that raises DearerError once a dense factor is cheaper.

    Args:
        most: iterations that it takes the time of. each: what one costs here beside a plain one.
    """

    def dearer(iterations: int, ahead: float) -> bool:
        if iterations < _FIRST_GUESS:
            return False
        left = min(_left(iterations, ahead, depth), _STUCK * iterations)
        # Twice the cost: the rate usually rises as the iteration goes on. Not beyond what is spent.
        if left * each > (most if iterations * each >= most else 2 * most):
            raise DearerError
        return False

    return dearer


class Iterative:
    """``M^-1`` by conjugate gradient on products with M.

    Args:
        product: ``v -> M v``, v [k, C, D], in v's dtype.
        source: the samples that M is of. outputs: their output curvature, chunk by chunk.
        preconditioner: "none", "kfac" or "nystrom".

    Attributes:
        pays: whether K-FAC was made: it is then used from the first iteration.
    """

    def __init__(
        self,
        product: Operator,
        source: Factors,
        outputs: Outputs,
        damping: float,
        preconditioner: str,
    ) -> None:
        self._product, self._source, self._outputs = product, source, outputs
        self.damping, self.preconditioner = damping, preconditioner
        self._precondition: Operator | None = None
        self.pays = False

    def approximates(self, most: float = math.inf) -> list[Approximate]:
        """In float32 where it can serve, then in float64, which takes over where that stalls.

        Args:
            most: iterations without a preconditioner that a dense factor takes the time of. Where
                they would not do (the first ones tell), the solves raise DearerError.
        """
        if self.preconditioner == "kfac":
            return [self._plain_first(most), self._solve]

        def solve(r: Tensor, goal: float) -> tuple[Tensor, int]:
            return self._solve(r.float(), goal, _in_time(_ahead(goal), most))

        return [solve, self._solve]

    def _solve(
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
            self._product,
            r,
            tolerance=_depth(goal, r.dtype),
            max_iterations=limit,
            precondition=None if plain else self._preconditioner(),
            give_up=give_up,
        )

    def _plain_first(self, most: float) -> Approximate:
        """In float32: K-FAC once it is likely to pay, which only the first iterations tell.

        (Measured: it saves from nothing to 25x.) At the mean rate so far what is left of this round
        is compared with making K-FAC and the iterations that it leaves.
        """
        plain = not self.pays
        source = self._source
        sizes = (source.num_tokens, source.num_classes, source.width)
        cost, applied = kfac_cost(*sizes), kfac_applied(*sizes)

        def solve(r: Tensor, goal: float) -> tuple[Tensor, int]:
            r, depth = r.float(), _ahead(goal)
            in_time, with_kfac = _in_time(depth, most), _KFAC_ITERATIONS * applied + cost / len(r)

            def slow(iterations: int, ahead: float) -> bool:
                nonlocal plain
                if iterations < _FIRST_GUESS:
                    return False
                # Its cost twice: the rate usually rises as the iteration goes on.
                pays = _left(iterations, ahead, depth) > with_kfac + cost / len(r)
                plain = not pays or with_kfac > most
                return in_time(iterations, ahead) if plain else True

            if not plain:
                return self._solve(r, goal, _in_time(depth, most, applied))
            x, products = self._solve(r, goal, give_up=slow, plain=True)
            if plain:
                return x, products
            rest = r - self._product(x)
            goal /= max(goal, float(_norms(rest).max()))
            correction, more = self._solve(rest, goal, _in_time(_ahead(goal), most, applied))
            return x + correction, products + len(r) + more

        return solve

    def _preconditioner(self) -> Operator | None:
        if self._precondition is None and self.preconditioner == "kfac":
            kfac, self.pays = self._kfac(), True
            self._precondition = lambda r: kfac.apply_inverse(r.to(kfac.damped)).to(r)
        elif self._precondition is None and self.preconditioner == "nystrom":
            source = self._source
            self._precondition = NystromPreconditioner.fit(
                lambda v: self._product(v) - self.damping * v,
                (source.num_classes, source.width),
                self.damping,
                source.device,
            )
        return self._precondition

    def _kfac(self) -> KroneckerEigenbasis:
        """In float32, unless the rounding of its eigenvalues would swamp the damping there."""
        try:
            kfac = fit_kfac(self._source, self.damping, self._outputs, torch.float32)
            noise = 16 * torch.finfo(torch.float32).eps * float(kfac.damped.max())
            if self.damping >= noise:
                return kfac
        except torch.linalg.LinAlgError:  # squares beyond float32's range
            pass
        return fit_kfac(self._source, self.damping, self._outputs)
