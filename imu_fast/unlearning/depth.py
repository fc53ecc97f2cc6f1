"""How deep is deep enough: stop rules and milestones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imu_fast.errors import InputError, check_positive
from imu_fast.evaluation.metrics import roc_auc
from imu_fast.unlearning.subject import Measured


@dataclass(frozen=True)
class StopRule:
    """When ascent is deep enough; the first condition met stops it (SPEC section 5).

    The step that crosses the line is bisected, so that two methods stop at the same depth.

    Args:
        forget_accuracy: stop at or below this accuracy on the forget set, in [0, 1].
        forget_loss: stop at or above this mean cross-entropy on the forget set.
        membership_auc: stop once the AUC that tells forget samples (positive) from ``unseen``
            ones by their confidence p_y is at or below this (0.5: indistinguishable).
        unseen: loader of samples the model never saw; needed by ``membership_auc``.
    """

    forget_accuracy: float | None = None
    forget_loss: float | None = None
    membership_auc: float | None = None
    unseen: Any = None

    def __post_init__(self) -> None:
        values = (self.forget_accuracy, self.forget_loss, self.membership_auc)
        if all(value is None for value in values):
            raise InputError(
                "stop=StopRule() has no condition; set forget_accuracy, forget_loss or "
                "membership_auc"
            )
        for name in ("forget_accuracy", "membership_auc"):
            value = getattr(self, name)
            if value is not None and check_positive(name, value, allow_zero=True) > 1:
                raise InputError(f"{name}={value!r} must lie in [0, 1]")
        if self.forget_loss is not None:
            check_positive("forget_loss", self.forget_loss, allow_zero=True)
        if self.membership_auc is not None and self.unseen is None:
            raise InputError("unseen=None: membership_auc needs a loader of unseen samples")

    def reached(self, state: Measured) -> str | None:
        """The name of the condition that holds now, or None."""
        forget = state.measure("forget")
        if self.forget_accuracy is not None and forget.accuracy <= self.forget_accuracy:
            return "forget_accuracy"
        if self.forget_loss is not None and forget.mean_loss >= self.forget_loss:
            return "forget_loss"
        if self.membership_auc is not None:
            unseen = state.measure("unseen")
            if roc_auc(forget.confidence, unseen.confidence) <= self.membership_auc:
                return "membership_auc"
        return None


OnMilestone = Callable[[str, dict[str, float]], None]


# A crossing step is bisected this often: t is then known to 2^-12 of the step.
BISECTIONS = 12
