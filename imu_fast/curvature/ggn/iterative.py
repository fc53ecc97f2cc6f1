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
# How deep conjugate gradient goes in a precision that cannot reach what is asked for: deeper digits
# come cheaper from the next refinement round.
_ROUND = 1e-3


def _norms(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)


def _depth(goal: float, dtype: torch.dtype) -> float:
    """The recurrence's tolerance for a true relative residual of ``goal``, if dtype has it."""
    return goal / 2 if goal >= 8 * torch.finfo(dtype).eps else _ROUND


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

    def approximates(self) -> list[Approximate]:
        """In float32 where it can serve, then in float64, which takes over where that stalls."""
        if self.preconditioner == "kfac":
            return [self._plain_first(), self._solve]
        return [lambda r, goal: self._solve(r.float(), goal), self._solve]

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

    def _plain_first(self) -> Approximate:
        """In float32: K-FAC once it is likely to pay, which only the first iterations tell.

        (Measured: it saves from nothing to 25x.) At the mean rate so far what is left of this round
        is compared with making K-FAC and the iterations that it leaves.
        """
        plain = not self.pays
        source = self._source
        sizes = (source.num_tokens, source.num_classes, source.width)
        cost, applied = kfac_cost(*sizes), kfac_applied(*sizes)

        def solve(r: Tensor, goal: float) -> tuple[Tensor, int]:
            r, depth = r.float(), -math.log(_depth(goal, torch.float32))

            def slow(iterations: int, ahead: float) -> bool:
                nonlocal plain
                if iterations < _FIRST_GUESS:
                    return False
                left, gained = math.log(ahead), max(depth - math.log(ahead), 1e-3)
                # Twice the cost: the rate usually rises as the iteration goes on.
                most = _KFAC_ITERATIONS * applied + 2 * cost / len(r)
                plain = iterations * left / gained <= most
                return not plain

            if not plain:
                return self._solve(r, goal)
            x, products = self._solve(r, goal, give_up=slow, plain=True)
            if plain:
                return x, products
            rest = r - self._product(x)
            largest = max(goal, float(_norms(rest).max()))
            correction, more = self._solve(rest, goal / largest)
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
