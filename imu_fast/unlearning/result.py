"""What unlearning returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from imu_fast.errors import ImuFastError


class DivergedError(ImuFastError, ArithmeticError):
    """The ascent's loss is no longer finite; the model is as it was before."""


@dataclass
class UnlearnResult:
    """The outcome of :func:`unlearn`.

    Attributes:
        model: the unlearned model (the user's own with ``inplace=True``).
        scores: [n] influence before the first step (minus the loss where that weighs); None
            for uniform weights.
        indices, weights: the selected forget samples [k] and their last weights [k].
        trajectory: one dict per record: step, epoch, forget_loss, forget_accuracy, the weights'
            mean, std and count, and ``<name>_loss``, ``<name>_accuracy`` per watched loader.
        batch_losses: the ascent's loss at every step.
        steps, epochs: optimizer steps made, and epochs begun.
        stopped_by: "epochs", "max_steps", "milestones" (the last one was passed), or the stop
            rule's condition.
        step_fraction: how much of the last step was kept by the bisection, in (0, 1].
        seconds: wall-clock time of the whole call.
        settings: every argument, as used.
        backends: which backend ran each operation.
    """

    model: nn.Module
    scores: Tensor | None
    indices: Tensor
    weights: Tensor
    trajectory: list[dict[str, float]] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0
    stopped_by: str = "epochs"
    step_fraction: float = 1.0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
