"""imu_fast: influence-guided machine unlearning at the cost of one forward pass.

The public names, loaded on first use: importing the package needs neither Triton
nor the compiled extension.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "backends": "backend",
    "capture": "model.capture",
    "capture_features": "model.capture",
    "curvatures": "curvature.named",
    "Data": "model.parts",
    "damped_cholesky_solve": "solvers.cholesky.cholesky",
    "evaluate": "evaluation.evaluate",
    "find_head": "model.head",
    "GradientFactors": "factors.gradient_factors",
    "influence_scores": "influence.scores",
    "influence_weights": "influence.weights",
    "linear_layers_matching": "model.head",
    "methods": "unlearning.named",
    "pairwise_influence": "influence.scores",
    "self_influence": "influence.scores",
    "StopRule": "unlearning.depth",
    "unlearn": "unlearning.unlearn",
    "UnlearnResult": "unlearning.unlearn",
    "use_backend": "backend",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from imu_fast.backend import backends as backends
    from imu_fast.backend import use_backend as use_backend
    from imu_fast.curvature.named import curvatures as curvatures
    from imu_fast.evaluation.evaluate import evaluate as evaluate
    from imu_fast.factors.gradient_factors import GradientFactors as GradientFactors
    from imu_fast.influence.scores import influence_scores as influence_scores
    from imu_fast.influence.scores import pairwise_influence as pairwise_influence
    from imu_fast.influence.scores import self_influence as self_influence
    from imu_fast.influence.weights import influence_weights as influence_weights
    from imu_fast.model.capture import capture as capture
    from imu_fast.model.capture import capture_features as capture_features
    from imu_fast.model.head import find_head as find_head
    from imu_fast.model.head import linear_layers_matching as linear_layers_matching
    from imu_fast.model.parts import Data as Data
    from imu_fast.solvers.cholesky.cholesky import damped_cholesky_solve as damped_cholesky_solve
    from imu_fast.unlearning.depth import StopRule as StopRule
    from imu_fast.unlearning.named import methods as methods
    from imu_fast.unlearning.unlearn import UnlearnResult as UnlearnResult
    from imu_fast.unlearning.unlearn import unlearn as unlearn


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'imu_fast' has no attribute {name!r}")
    value = getattr(import_module(f"imu_fast.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
