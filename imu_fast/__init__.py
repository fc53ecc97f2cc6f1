"""imu_fast: influence-guided machine unlearning at the cost of one forward pass.

The public names of SPEC section 7, loaded on first use: importing the package needs neither Triton
nor the compiled extension.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "GradientFactors": "factors",
    "StopRule": "ascent",
    "UnlearnResult": "unlearn",
    "backends": "backend",
    "capture": "capture",
    "capture_features": "capture",
    "curvatures": "curvature",
    "damped_cholesky_solve": "solvers.cholesky",
    "evaluate": "evaluation.metrics",
    "find_head": "capture",
    "influence_scores": "influence",
    "influence_weights": "weighting",
    "linear_layers_matching": "capture",
    "methods": "methods",
    "pairwise_influence": "influence",
    "self_influence": "influence",
    "unlearn": "unlearn",
    "use_backend": "backend",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from imu_fast.ascent import StopRule as StopRule
    from imu_fast.backend import backends as backends
    from imu_fast.backend import use_backend as use_backend
    from imu_fast.capture import capture as capture
    from imu_fast.capture import capture_features as capture_features
    from imu_fast.capture import find_head as find_head
    from imu_fast.capture import linear_layers_matching as linear_layers_matching
    from imu_fast.curvature import curvatures as curvatures
    from imu_fast.evaluation.metrics import evaluate as evaluate
    from imu_fast.factors import GradientFactors as GradientFactors
    from imu_fast.influence import influence_scores as influence_scores
    from imu_fast.influence import pairwise_influence as pairwise_influence
    from imu_fast.influence import self_influence as self_influence
    from imu_fast.methods import methods as methods
    from imu_fast.solvers.cholesky import damped_cholesky_solve as damped_cholesky_solve
    from imu_fast.unlearn import UnlearnResult as UnlearnResult
    from imu_fast.unlearn import unlearn as unlearn
    from imu_fast.weighting import influence_weights as influence_weights


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'imu_fast' has no attribute {name!r}")
    value = getattr(import_module(f"imu_fast.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps ``imu_fast.unlearn`` the function: importing the submodule of that name would bind it.

    Users still reach the submodule with ``from imu_fast.unlearn import ...``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
