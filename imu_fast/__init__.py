"""imu_fast: influence-guided machine unlearning at the cost of one forward pass.

The public names, loaded on first use: importing the package needs neither Triton
nor the compiled extension.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Ascent": "unlearning.ascent.ascent",
    "Auto": "unlearning.auto",
    "backends": "backend",
    "batch_weights": "influence.batch",
    "BinaryCrossEntropy": "losses.binary_cross_entropy",
    "build_index": "attribution.index",
    "capture": "model.capture",
    "capture_features": "model.capture",
    "CrossEntropy": "losses.cross_entropy",
    "Curvature": "curvature.base",
    "curvatures": "curvature.named",
    "damped_cholesky_solve": "solvers.cholesky.solve",
    "Data": "model.parts",
    "DivergedError": "unlearning.result",
    "EKFAC": "curvature.kfac",
    "evaluate": "evaluation.evaluate",
    "find_head": "model.head",
    "Fisher": "curvature.fisher",
    "FisherDiag": "curvature.fisher_diag",
    "fit": "curvature.named",
    "Fitted": "curvature.base",
    "GGN": "curvature.ggn.ggn",
    "GGNBlock": "curvature.ggn_block",
    "GradientFactors": "factors.gradient_factors",
    "GradientIndex": "attribution.gradient_index",
    "Head": "unlearning.ascent.scopes",
    "Identity": "curvature.identity",
    "ImplicitHead": "factors.implicit_head",
    "ImuFastError": "errors",
    "Influence": "unlearning.ascent.weights",
    "influence_scores": "influence.scores",
    "influence_weights": "influence.weights",
    "InfluenceWeightedLoss": "influence.batch",
    "InputError": "errors",
    "KFAC": "curvature.kfac",
    "Layers": "unlearning.ascent.scopes",
    "leave_one_out": "attribution.leave_one_out",
    "LeaveOneOut": "attribution.leave_one_out",
    "linear_layers_matching": "model.head",
    "live_weights": "influence.live",
    "load_index": "attribution.index",
    "load_operator": "curvature.stored",
    "load_summary": "unlearning.summary.summary",
    "load_text": "data.text",
    "LossWeights": "unlearning.ascent.weights",
    "MarginEdit": "unlearning.edit.margin_edit",
    "matrix_to_vector": "curvature.parameters",
    "methods": "unlearning.named",
    "Network": "unlearning.ascent.scopes",
    "NewtonRemoval": "unlearning.edit.newton",
    "OutputCurvature": "losses.output_curvature",
    "pairwise_influence": "influence.scores",
    "parameter_importance": "importance.importance",
    "pairwise_similarity": "attribution.similarity",
    "Permuted": "unlearning.ascent.weights",
    "ProcessError": "errors",
    "record_backends": "backend",
    "Refusal": "unlearning.ascent.objectives",
    "Retain": "unlearning.ascent.retain",
    "save_summary": "unlearning.summary.saving",
    "self_influence": "influence.scores",
    "SelfDistillation": "unlearning.edit.distillation",
    "SGD": "unlearning.ascent.optimizer",
    "ShardedFactors": "factors.sharded",
    "ShardedHead": "factors.sharded_head",
    "similarity_scores": "attribution.similarity",
    "SimNPO": "unlearning.ascent.objectives",
    "split": "unlearning.split",
    "SquaredError": "losses.squared_error",
    "StopRule": "unlearning.depth",
    "top_influences": "influence.top",
    "tracin": "attribution.tracin",
    "tracin_self_influence": "attribution.tracin",
    "TrainingSummary": "unlearning.summary.summary",
    "UnfoldedFactors": "factors.unfolded",
    "Uniform": "unlearning.ascent.weights",
    "unlearn": "unlearning.unlearn",
    "unlearn_in_turn": "unlearning.in_turn",
    "UnlearnResult": "unlearning.result",
    "use_backend": "backend",
    "use_precision": "precision",
    "validate": "evaluation.validate",
    "vector_to_matrix": "curvature.parameters",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from imu_fast.attribution.gradient_index import GradientIndex as GradientIndex
    from imu_fast.attribution.index import build_index as build_index
    from imu_fast.attribution.index import load_index as load_index
    from imu_fast.attribution.leave_one_out import LeaveOneOut as LeaveOneOut
    from imu_fast.attribution.leave_one_out import leave_one_out as leave_one_out
    from imu_fast.attribution.similarity import pairwise_similarity as pairwise_similarity
    from imu_fast.attribution.similarity import similarity_scores as similarity_scores
    from imu_fast.attribution.tracin import tracin as tracin
    from imu_fast.attribution.tracin import tracin_self_influence as tracin_self_influence
    from imu_fast.backend import backends as backends
    from imu_fast.backend import record_backends as record_backends
    from imu_fast.backend import use_backend as use_backend
    from imu_fast.curvature.base import Curvature as Curvature
    from imu_fast.curvature.base import Fitted as Fitted
    from imu_fast.curvature.fisher import Fisher as Fisher
    from imu_fast.curvature.fisher_diag import FisherDiag as FisherDiag
    from imu_fast.curvature.ggn.ggn import GGN as GGN
    from imu_fast.curvature.ggn_block import GGNBlock as GGNBlock
    from imu_fast.curvature.identity import Identity as Identity
    from imu_fast.curvature.kfac import EKFAC as EKFAC
    from imu_fast.curvature.kfac import KFAC as KFAC
    from imu_fast.curvature.named import curvatures as curvatures
    from imu_fast.curvature.named import fit as fit
    from imu_fast.curvature.parameters import matrix_to_vector as matrix_to_vector
    from imu_fast.curvature.parameters import vector_to_matrix as vector_to_matrix
    from imu_fast.curvature.stored import load_operator as load_operator
    from imu_fast.data.text import load_text as load_text
    from imu_fast.errors import ImuFastError as ImuFastError
    from imu_fast.errors import InputError as InputError
    from imu_fast.errors import ProcessError as ProcessError
    from imu_fast.evaluation.evaluate import evaluate as evaluate
    from imu_fast.evaluation.validate import validate as validate
    from imu_fast.factors.gradient_factors import GradientFactors as GradientFactors
    from imu_fast.factors.implicit_head import ImplicitHead as ImplicitHead
    from imu_fast.factors.sharded import ShardedFactors as ShardedFactors
    from imu_fast.factors.sharded_head import ShardedHead as ShardedHead
    from imu_fast.factors.unfolded import UnfoldedFactors as UnfoldedFactors
    from imu_fast.importance.importance import parameter_importance as parameter_importance
    from imu_fast.influence.batch import InfluenceWeightedLoss as InfluenceWeightedLoss
    from imu_fast.influence.batch import batch_weights as batch_weights
    from imu_fast.influence.live import live_weights as live_weights
    from imu_fast.influence.scores import influence_scores as influence_scores
    from imu_fast.influence.scores import pairwise_influence as pairwise_influence
    from imu_fast.influence.scores import self_influence as self_influence
    from imu_fast.influence.top import top_influences as top_influences
    from imu_fast.influence.weights import influence_weights as influence_weights
    from imu_fast.losses.binary_cross_entropy import BinaryCrossEntropy as BinaryCrossEntropy
    from imu_fast.losses.cross_entropy import CrossEntropy as CrossEntropy
    from imu_fast.losses.output_curvature import OutputCurvature as OutputCurvature
    from imu_fast.losses.squared_error import SquaredError as SquaredError
    from imu_fast.model.capture import capture as capture
    from imu_fast.model.capture import capture_features as capture_features
    from imu_fast.model.head import find_head as find_head
    from imu_fast.model.head import linear_layers_matching as linear_layers_matching
    from imu_fast.model.parts import Data as Data
    from imu_fast.precision import use_precision as use_precision
    from imu_fast.solvers.cholesky.solve import damped_cholesky_solve as damped_cholesky_solve
    from imu_fast.unlearning.ascent.ascent import Ascent as Ascent
    from imu_fast.unlearning.ascent.objectives import Refusal as Refusal
    from imu_fast.unlearning.ascent.objectives import SimNPO as SimNPO
    from imu_fast.unlearning.ascent.optimizer import SGD as SGD
    from imu_fast.unlearning.ascent.retain import Retain as Retain
    from imu_fast.unlearning.ascent.scopes import Head as Head
    from imu_fast.unlearning.ascent.scopes import Layers as Layers
    from imu_fast.unlearning.ascent.scopes import Network as Network
    from imu_fast.unlearning.ascent.weights import Influence as Influence
    from imu_fast.unlearning.ascent.weights import LossWeights as LossWeights
    from imu_fast.unlearning.ascent.weights import Permuted as Permuted
    from imu_fast.unlearning.ascent.weights import Uniform as Uniform
    from imu_fast.unlearning.auto import Auto as Auto
    from imu_fast.unlearning.depth import StopRule as StopRule
    from imu_fast.unlearning.edit.distillation import SelfDistillation as SelfDistillation
    from imu_fast.unlearning.edit.margin_edit import MarginEdit as MarginEdit
    from imu_fast.unlearning.edit.newton import NewtonRemoval as NewtonRemoval
    from imu_fast.unlearning.in_turn import unlearn_in_turn as unlearn_in_turn
    from imu_fast.unlearning.named import methods as methods
    from imu_fast.unlearning.result import DivergedError as DivergedError
    from imu_fast.unlearning.result import UnlearnResult as UnlearnResult
    from imu_fast.unlearning.split import split as split
    from imu_fast.unlearning.summary.saving import save_summary as save_summary
    from imu_fast.unlearning.summary.summary import TrainingSummary as TrainingSummary
    from imu_fast.unlearning.summary.summary import load_summary as load_summary
    from imu_fast.unlearning.unlearn import unlearn as unlearn


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'imu_fast' has no attribute {name!r}")
    value = getattr(import_module(f"imu_fast.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
