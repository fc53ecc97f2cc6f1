"""The table of curvatures, and fitting one by name.

Adding one: a file with its options and its fitted class, and its line here.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from typing_extensions import TypedDict, Unpack

from imu_fast.ambient import no_autocast
from imu_fast.curvature.base import Curvature, Fitted
from imu_fast.curvature.fisher import Fisher
from imu_fast.curvature.fisher_diag import DampingMode, FisherDiag
from imu_fast.curvature.gauss_newton import Fisher as Labels
from imu_fast.curvature.ggn.ggn import GGN, Preconditioner, Solver
from imu_fast.curvature.ggn_block import GGNBlock
from imu_fast.curvature.identity import Identity
from imu_fast.curvature.kfac import EKFAC, KFAC
from imu_fast.errors import InputError
from imu_fast.factors.joint import joint, said
from imu_fast.factors.source import Factors, is_factors
from imu_fast.options import Table

CURVATURES: Table[Curvature] = Table(
    "curvature",
    Curvature,  # type: ignore[type-abstract]
    {
        "ekfac": EKFAC,
        "fisher": Fisher,
        "fisher_diag": FisherDiag,
        "ggn": GGN,
        "ggn_block": GGNBlock,
        "identity": Identity,
        "kfac": KFAC,
    },
)
CurvatureName = Literal["ekfac", "fisher", "fisher_diag", "ggn", "ggn_block", "identity", "kfac"]


class OwnOptions(TypedDict, total=False):
    """Flat options that some curvatures have."""

    damping_mode: DampingMode
    fisher: Labels
    solver: Solver
    tolerance: float
    preconditioner: Preconditioner


class CurvatureOptions(OwnOptions, total=False):
    """Flat options of all curvatures."""

    damping: float


def curvatures() -> list[str]:
    """Names that ``curvature=`` accepts."""
    return sorted(CURVATURES)


@joint
@no_autocast
def fit(
    curvature: CurvatureName | Curvature,
    factors: Factors,
    **options: Unpack[CurvatureOptions],
) -> Fitted:
    """A curvature of these samples as an operator on the layer's parameters [C, D].

    ``M @ v`` and ``M.solve(v)`` in v's dtype, ``M.diagonal()``, ``M.self_influence(factors)``,
    ``M.pairwise(factors, queries)``, ``M.linear_operator()`` for scipy, ``M.save(path)`` and
    :func:`imu_fast.load_operator`: see :class:`imu_fast.Fitted`. M is damped: ``M.damping`` is lam,
    in absolute terms also where ``damping_mode="relative"`` makes it of the mean eigenvalue.

    Args:
        curvature: an object such as ``imu.GGN(damping=1e-3)``, or a name out of
            :func:`imu_fast.curvatures`, which is short for the object with its defaults.
        factors: the samples that define it, of one layer.
        options: of the named curvature, such as ``damping=1e-3``.

    Raises:
        InputError: unknown name or option, a bad value, an object together with options, or
            factors that the curvature cannot be made of.
    """
    spec = CURVATURES.choose(curvature, **options)
    check_factors(factors)
    said(factors, lambda: f"fit({spec!r})")
    return spec.fit(factors)


def check_factors(factors: Any) -> None:
    """Raise InputError unless these are the factors of one layer."""
    if isinstance(factors, (list, tuple)):
        raise InputError(
            f"factors is a list of {len(factors)} layers; a curvature is of one layer: fit each, "
            "[imu_fast.fit(curvature, layer) for layer in factors]"
        )
    if isinstance(factors, nn.Module):
        raise InputError(
            f"factors is a model ({type(factors).__name__}); capture it first: "
            "factors = imu_fast.capture(model, data)"
        )
    if not is_factors(factors):
        raise InputError(
            f"factors is a {type(factors).__name__}; pass GradientFactors, which "
            "imu_fast.capture(model, data) makes"
        )
