"""Curvatures ``M`` of SPEC section 2: one file each, all with ``fit(factors) -> .solve(v)``.

Adding one: a class with :class:`Curvature`'s methods in its own file, and a line in ``_KNOWN``.
"""

from __future__ import annotations

import inspect
from typing import Any

from imu_fast.curvature.base import Curvature
from imu_fast.curvature.fisher import Fisher
from imu_fast.curvature.fisher_diag import FisherDiag
from imu_fast.curvature.ggn.ggn import GGN
from imu_fast.curvature.ggn_block import GGNBlock
from imu_fast.curvature.identity import Identity
from imu_fast.curvature.kfac import EKFAC, KFAC
from imu_fast.errors import check_choice, check_positive
from imu_fast.factors.gradient_factors import GradientFactors

_KNOWN: dict[str, Any] = {
    "ekfac": EKFAC,
    "fisher": Fisher,
    "fisher_diag": FisherDiag,
    "ggn": GGN,
    "ggn_block": GGNBlock,
    "identity": Identity,
    "kfac": KFAC,
}


def curvatures() -> list[str]:
    """Names that ``curvature=`` accepts."""
    return sorted(_KNOWN)


def fit(name: str, factors: GradientFactors, damping: float, **options: Any) -> Curvature:
    """Fit a curvature by name.

    Args:
        factors: the samples that define it.
        damping: lam > 0.
        options: of that curvature, such as ``damping_mode`` of ``fisher_diag``.

    Raises:
        InputError: unknown name or option, damping not positive and finite.
    """
    check_choice("curvature", name, curvatures())
    check_positive("damping", damping)
    fit_one = _KNOWN[name].fit
    known = [k for k in inspect.signature(fit_one).parameters if k not in ("factors", "damping")]
    for option in options:
        check_choice(f"options of curvature={name!r}", option, known)
    fitted: Curvature = fit_one(factors, float(damping), **options)
    return fitted
