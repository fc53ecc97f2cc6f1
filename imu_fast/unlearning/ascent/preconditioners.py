"""Damped inverse curvatures that the head's ascent gradient is multiplied by (SPEC section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imu_fast.curvature.ggn.costs import choose_solver
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import InputError, check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.statistics import second_moment, trace
from imu_fast.solvers.cholesky.cholesky import damped_cholesky_solve

# About how many steps a run takes, for the choice of the GGN's solver.
_SOLVES = 100
PRECONDITIONERS = ("features", "ggn", "kfac")
Precondition = str | Tensor | Any | None


def describe(precondition: Precondition) -> str | None:
    """A name for the settings of a run.

    Raises:
        InputError: neither a known name, nor a second moment, nor a fitted curvature.
    """
    if precondition is None or isinstance(precondition, str):
        if precondition not in (None, *PRECONDITIONERS):
            raise InputError(
                f"precondition={precondition!r} is unknown; choose one of "
                f"{', '.join(PRECONDITIONERS)}, or pass a second moment [D, D] or a "
                "fitted curvature"
            )
        return precondition
    if isinstance(precondition, Tensor):
        return "a second moment [D, D]"
    if not callable(getattr(precondition, "solve", None)):
        raise InputError(
            f"precondition is a {type(precondition).__name__}; pass a name, a second moment [D, D] "
            "or a fitted curvature (with .solve)"
        )
    return f"a fitted {type(precondition).__name__.removeprefix('Fitted')}"


def preconditioner(
    precondition: Precondition, factors: GradientFactors, eps: float
) -> Callable[[Tensor], Tensor] | None:
    """``gradient -> M gradient``, both [C, D].

    Args:
        precondition: ``"features"``: ``M = (S + eps tr(S)/D I)^-1`` on the right, S the forget
            features' second moment, or a stored S [D, D]. ``"ggn"``, ``"kfac"``: the forget set's
            curvature at the trained model, damped by eps times its mean eigenvalue. A fitted
            curvature: its own solve.
        factors: of the forget set at the trained model.

    Raises:
        InputError: a second moment of another size.
    """
    if precondition is None:
        return None
    check_positive("precondition_eps", eps)
    if isinstance(precondition, str) and precondition != "features":
        mean = trace(factors) / (factors.num_classes * factors.width)
        # A saturated model has no curvature to speak of: M is then a multiple of the identity.
        damping = max(eps * mean, torch.finfo(torch.float32).tiny)
        options: dict[str, Any] = {}
        if precondition == "ggn":
            # A direction needs few digits, and is asked for at every step: a factor pays.
            sizes = (factors.num_tokens, factors.num_classes, factors.width)
            options = {"solver": choose_solver(*sizes, solves=_SOLVES), "tolerance": 1e-2}
        return CURVATURES.choose(precondition, damping=damping, **options).fit(factors).solve
    if not isinstance(precondition, str | Tensor):
        return precondition.solve
    if isinstance(precondition, Tensor):
        s = precondition.double()
        if s.shape != (factors.width, factors.width):
            raise InputError(
                f"precondition has shape {tuple(s.shape)}; expected the features' second moment "
                f"[{factors.width}, {factors.width}] (with the bias's 1)"
            )
    else:
        s = second_moment(factors)
    eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
    inverse = damped_cholesky_solve(s, eye, eps * float(s.diagonal().mean()))
    inverse = inverse.to(factors.delta)
    return lambda gradient: gradient @ inverse
