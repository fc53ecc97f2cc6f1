"""Methods by name: each is short for an object with its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from imu_fast.curvature.base import Curvature
from imu_fast.curvature.named import CurvatureName, CurvatureOptions
from imu_fast.options import Table
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.ascent.objectives import (
    NPO,
    Margin,
    Objective,
    ObjectiveName,
    Relabel,
    SimNPO,
)
from imu_fast.unlearning.ascent.optimizer import Make, Optimizer, OptimizerName
from imu_fast.unlearning.ascent.preconditioners import (
    Features,
    HasSolve,
    Preconditioner,
    PreconditionerName,
)
from imu_fast.unlearning.ascent.scopes import Head, Scope, ScopeName
from imu_fast.unlearning.ascent.weights import (
    Influence,
    LossWeights,
    Permuted,
    Weights,
    WeightsName,
)
from imu_fast.unlearning.auto import Auto, Task, single_row
from imu_fast.unlearning.edit.distillation import SelfDistillation
from imu_fast.unlearning.edit.margin_edit import MarginEdit, MetricName
from imu_fast.unlearning.edit.newton import NewtonRemoval, Then
from imu_fast.unlearning.method import Method
from imu_fast.unlearning.summary.summary import TrainingSummary

_NAMED: dict[str, tuple[str, Callable[[], Method]]] = {
    "auto": ("single_row (class), self_distillation (samples), simnpo (sequences)", Auto),
    "imu": (
        "ascent weighted by influence at the classifier (IMU)",
        lambda: Ascent(weights=Influence()),
    ),
    "permuted": (
        "ascent with IMU's weights shuffled (control)",
        lambda: Ascent(weights=Permuted()),
    ),
    "loss_weights": (
        "ascent weighted by the square root of the loss",
        lambda: Ascent(weights=LossWeights()),
    ),
    "uniform": ("uniform gradient ascent", Ascent),
    "npo": ("negative preference optimisation", lambda: Ascent(objective=NPO())),
    "simnpo": ("NPO by length-normalised likelihood", lambda: Ascent(objective=SimNPO())),
    "random_label": (
        "descent on random wrong labels",
        lambda: Ascent(objective=Relabel(target="random")),
    ),
    "boundary_shrink": (
        "descent on the nearest wrong class (boundary shrink)",
        lambda: Ascent(objective=Relabel(target="nearest")),
    ),
    "preconditioned": (
        "preconditioned ascent of the head",
        lambda: Ascent(objective=Margin(), scope=Head(precondition=Features())),
    ),
    "single_row": ("ascent of the forgotten classes' rows alone", single_row),
    "margin_edit": ("smallest edit of the head that flips the forget samples", MarginEdit),
    "newton_removal": ("Newton step to the head trained without the forget samples", NewtonRemoval),
    "self_distillation": (
        "distillation of the model's own predictions, the labels' logits lowered",
        SelfDistillation,
    ),
}
MethodName = Literal[
    "auto",
    "imu",
    "permuted",
    "loss_weights",
    "uniform",
    "npo",
    "simnpo",
    "random_label",
    "boundary_shrink",
    "preconditioned",
    "single_row",
    "margin_edit",
    "newton_removal",
    "self_distillation",
]
METHODS: Table[Method] = Table(
    "method",
    Method,  # type: ignore[type-abstract]
    {k: make for k, (_, make) in _NAMED.items()},
)
SUMMARIES: dict[str, str] = {k: summary for k, (summary, _) in _NAMED.items()}


def methods() -> list[str]:
    """Names that ``method=`` accepts."""
    return list(METHODS)


class MethodOptions(CurvatureOptions, total=False):
    """Every flat option of any method; which method has which is said by ``unlearn``."""

    weights: WeightsName | Weights
    curvature: CurvatureName | Curvature
    top_fraction: float
    clip_quantile: float
    quantile_over: Literal["kept", "all"]
    on_empty: Literal["error", "uniform"]
    first_row_is_mean: bool
    reweight: Literal["once", "epoch", "batch"]
    objective: ObjectiveName | Objective
    target: Literal["random", "nearest"]
    beta: float
    gamma: float
    answer: Sequence[int] | Tensor
    retain: Any
    retain_loss: Literal["ce", "kl"]
    retain_weight: float
    scope: ScopeName | Scope
    layers: str | nn.Module | Sequence[str | nn.Module]
    layer: str | nn.Module
    rows: Literal["all", "forgotten"]
    precondition: PreconditionerName | Preconditioner | Tensor | HasSolve
    precondition_eps: float
    eps: float
    batchnorm: Literal["eval", "train"]
    dropout: Literal["eval", "train"]
    scored: Literal["head", "trained"]
    optimizer: OptimizerName | Optimizer | Make
    lr: float
    momentum: float
    weight_decay: float
    epochs: int
    max_steps: int
    batch_size: int
    alpha: float
    record: Literal["epoch", "step", "ends"] | None
    preset: Literal["paper"]
    task: Task
    unseen: Any
    margin: float
    metric: MetricName
    moment: Tensor
    summary: TrainingSummary
    k: float
    then: Then
    targets: Tensor
    calibrated: bool
