"""Damped inverse curvatures that the head's ascent gradient is multiplied by.

The product is rescaled to the gradient's own norm, so that a learning rate means the same with
each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from imu_fast.curvature.ggn.costs import choose_solver
from imu_fast.curvature.ggn.ggn import GGN
from imu_fast.curvature.kfac import KFAC
from imu_fast.errors import InputError, check_positive
from imu_fast.factors.source import Factors, in_memory
from imu_fast.factors.statistics import second_moment, trace
from imu_fast.options import Options, Table, option, options
from imu_fast.solvers.cholesky.solve import damped_cholesky_solve

# About how many steps a run takes, for the choice of the GGN's solver.
_SOLVES = 100
Apply = Callable[[Tensor], Tensor]


class HasSolve(Protocol):
    """A fitted curvature, of ours or not."""

    def solve(self, v: Tensor, /) -> Tensor:
        """``M^-1 v``: [C, D]."""
        ...


class Preconditioner(Options):
    """Makes ``gradient -> M gradient``, both [C, D], from the forget set's factors."""

    def fit(self, factors: Factors) -> Apply | None:
        """M at the trained model, or None for the identity.

        Raises:
            InputError: what is stored does not fit the head.
        """
        return None


@options
class NoPreconditioner(Preconditioner):
    """Plain ascent."""

    name = "none"


def _on_the_right(s: Tensor, eps: float, dtype: torch.dtype) -> Apply:
    """``gradient (S + eps tr(S)/D I)^-1``."""
    eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
    inverse = damped_cholesky_solve(s, eye, eps * float(s.diagonal().mean())).to(dtype)
    return lambda gradient: gradient @ inverse


@options
class Features(Preconditioner):
    """``M = (S + eps tr(S)/D I)^-1`` on the right, S the forget features' second moment."""

    name = "features"
    eps: float = option(default=1e-2, check=check_positive, also="precondition_eps")

    def fit(self, factors: Factors) -> Apply:
        return _on_the_right(second_moment(factors), self.eps, factors.dtype)


@options
class SecondMoment(Preconditioner):
    """As :class:`Features`, with a stored S [D, D], such as the training set's."""

    moment: Tensor = option()
    eps: float = option(default=1e-2, check=check_positive, also="precondition_eps")

    def fit(self, factors: Factors) -> Apply:
        s = self.moment.double()
        if s.shape != (factors.width, factors.width):
            raise InputError(
                f"precondition has shape {tuple(s.shape)}; expected the features' second moment "
                f"[{factors.width}, {factors.width}] (with the bias's 1)"
            )
        return _on_the_right(s, self.eps, factors.dtype)


class _Curved(Preconditioner):
    """The forget set's curvature at the trained model, damped by eps times its mean eigenvalue."""

    eps: float

    def _damping(self, factors: Factors) -> float:
        mean = trace(factors) / (factors.num_classes * factors.width)
        # A saturated model has no curvature to speak of: M is then a multiple of the identity.
        return max(self.eps * mean, torch.finfo(torch.float32).tiny)


@options
class GGNPreconditioner(_Curved):
    """By the generalised Gauss-Newton matrix."""

    name = "ggn"
    eps: float = option(default=1e-2, check=check_positive, also="precondition_eps")

    def fit(self, factors: Factors) -> Apply:
        # A direction needs few digits, and is asked for at every step: a factor pays.
        sizes = (factors.num_tokens, factors.num_classes, factors.width)
        solver: Any = choose_solver(*sizes, solves=_SOLVES)
        ggn = GGN(damping=self._damping(factors), solver=solver, tolerance=1e-2)
        # It is solved with while the weight changes, which factors must not depend on.
        return ggn.fit(in_memory(factors, "precondition='ggn'")).solve


@options
class KFACPreconditioner(_Curved):
    """By its Kronecker factors."""

    name = "kfac"
    eps: float = option(default=1e-2, check=check_positive, also="precondition_eps")

    def fit(self, factors: Factors) -> Apply:
        return KFAC(damping=self._damping(factors)).fit(factors).solve


@options
class Inverse(Preconditioner):
    """By a fitted curvature (of the training set, say): its own solve."""

    fitted: HasSolve = option()

    def fit(self, factors: Factors) -> Apply:
        return self.fitted.solve


def _held(value: Any) -> Preconditioner | None:
    if isinstance(value, Tensor):
        return SecondMoment(moment=value)
    if not isinstance(value, str | Options) and callable(getattr(value, "solve", None)):
        return Inverse(fitted=value)
    if isinstance(value, Options):
        return None
    raise InputError(
        f"precondition is a {type(value).__name__}; pass one of {', '.join(PRECONDITIONERS)}, a "
        "second moment [D, D] or a fitted curvature (with .solve)"
    )


PreconditionerName = Literal["none", "features", "ggn", "kfac"]
PRECONDITIONERS: Table[Preconditioner] = Table(
    "precondition",
    Preconditioner,
    {
        "none": NoPreconditioner,
        "features": Features,
        "ggn": GGNPreconditioner,
        "kfac": KFACPreconditioner,
    },
    _held,
)
