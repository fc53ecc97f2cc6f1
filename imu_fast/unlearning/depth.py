"""How deep is deep enough: stop rules, milestones, and the bisection of the step that crosses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from imu_fast.errors import InputError, check_positive, plain_number
from imu_fast.evaluation.metrics import roc_auc
from imu_fast.unlearning.result import Record
from imu_fast.unlearning.subject import Measured

OnMilestone = Callable[[str, Record], None]
# A crossing step is bisected this often: t is then known to 2^-12 of the step.
BISECTIONS = 12
_CONDITIONS = ("forget_accuracy", "unseen_accuracy", "forget_loss", "membership_auc")


@dataclass(frozen=True, repr=False)
class StopRule:
    """When a run is deep enough; the first condition met stops it.

    The step that crosses the line is bisected, so that two methods stop at the same depth. A
    condition that holds before the first step makes the run end there: no step is made.

    Args:
        forget_accuracy: stop at or below this accuracy on the forget set, in [0, 1].
        forget_loss: stop at or above this mean cross-entropy on the forget set.
        unseen_accuracy: stop where the forget set is predicted no better than data that the model
            never saw: that accuracy, in [0, 1], or such data (a loader, or tensors (X, y)), on
            which the model is measured once, before it is changed. The depth at which a random
            forget set is as if it had never been learned.
        membership_auc: stop once the AUC that tells forget samples (positive) from ``unseen``
            ones by their confidence p_y is at or below this (0.5: indistinguishable).
        unseen: loader of samples the model never saw; needed by ``membership_auc``.
    """

    forget_accuracy: float | None = None
    forget_loss: float | None = None
    membership_auc: float | None = None
    unseen: Any = None
    unseen_accuracy: Any = None

    def __post_init__(self) -> None:
        for name in _CONDITIONS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        if all(getattr(self, name) is None for name in _CONDITIONS):
            raise InputError(
                f"stop=StopRule() has no condition; set {', '.join(_CONDITIONS[:-1])} or "
                f"{_CONDITIONS[-1]}"
            )
        for name in ("forget_accuracy", "membership_auc", "unseen_accuracy"):
            value = getattr(self, name)
            if value is None or (name == "unseen_accuracy" and _is_data(value)):
                continue
            if check_positive(name, value, allow_zero=True) > 1:
                raise InputError(f"{name}={value!r} must lie in [0, 1]")
        if self.forget_loss is not None:
            check_positive("forget_loss", self.forget_loss, allow_zero=True)
        if self.membership_auc is not None and self.unseen is None:
            raise InputError("unseen=None: membership_auc needs a loader of unseen samples")
        if self.membership_auc is None and self.unseen is not None:
            raise InputError(
                "unseen is given without membership_auc, which alone uses it; set it, or pass the "
                "loader as unseen_accuracy"
            )

    def __repr__(self) -> str:
        """The conditions that are set."""
        shown = [
            f"{name}={'data' if _is_data(value) else format(value, 'g')}"
            for name in _CONDITIONS
            if (value := getattr(self, name)) is not None
        ]
        return f"StopRule({', '.join(shown)})"

    @property
    def accuracy(self) -> float | None:
        """The highest accuracy on the forget set that stops the run; None: none is named."""
        named = [a for a in (self.forget_accuracy, self.unseen_accuracy) if a is not None]
        return max(named, default=None)

    def measured(self, accuracy_on: Callable[[Any], float]) -> StopRule:
        """With the accuracy itself where ``unseen_accuracy`` is data."""
        if not _is_data(self.unseen_accuracy):
            return self
        return replace(self, unseen_accuracy=accuracy_on(self.unseen_accuracy))

    def reached(self, state: Measured) -> str | None:
        """The name of the condition that holds now, or None."""
        forget = state.measure("forget")
        for name in ("forget_accuracy", "unseen_accuracy"):
            if (line := getattr(self, name)) is not None and forget.accuracy <= line:
                return name
        if self.forget_loss is not None and forget.mean_loss >= self.forget_loss:
            return "forget_loss"
        if self.membership_auc is not None:
            unseen = state.measure("unseen")
            if roc_auc(forget.confidence, unseen.confidence) <= self.membership_auc:
                return "membership_auc"
        return None


def _is_data(value: Any) -> bool:
    """Whether ``unseen_accuracy`` is not a number but what to measure it on."""
    return not isinstance(value, str | bool | Real | None)


@dataclass(frozen=True)
class Depths:
    """Where a run stops, and where it stops for a moment on the way.

    Attributes:
        stop: the end; None: the last milestone, or the budget where there are none.
        milestones: depths on the way, by name.
        on_milestone: called with a milestone's name and record, the model being there.
    """

    stop: StopRule | None = None
    milestones: Mapping[str, StopRule] | None = None
    on_milestone: OnMilestone | None = None

    def __post_init__(self) -> None:
        if self.on_milestone is not None and not callable(self.on_milestone):
            raise InputError(
                f"on_milestone={self.on_milestone!r} cannot be called; pass a function of a name "
                "and a record"
            )
        for rule in self.rules:
            if not isinstance(rule, StopRule):
                raise InputError(
                    f"stop or a milestone is a {type(rule).__name__}; pass imu_fast.StopRule(...)"
                )
        unseen = [rule.unseen for rule in self.rules if rule.unseen is not None]
        if any(other is not unseen[0] for other in unseen):
            raise InputError("stop and milestones name several unseen loaders; pass one to all")
        if self.on_milestone is not None and not self.milestones:
            raise InputError("on_milestone is given without milestones; name the depths there")

    @property
    def rules(self) -> list[StopRule]:
        """Every rule, the milestones' first."""
        stop = [] if self.stop is None else [self.stop]
        return [*(self.milestones or {}).values(), *stop]

    def measured(self, accuracy_on: Callable[[Any], float]) -> Depths:
        """With accuracies in place of unseen data, each of them measured once."""
        known: list[tuple[Any, float]] = []

        def once(data: Any) -> float:
            for other, accuracy in known:
                if other is data:
                    return accuracy
            known.append((data, accuracy_on(data)))
            return known[-1][1]

        return replace(
            self,
            stop=None if self.stop is None else self.stop.measured(once),
            milestones=None
            if self.milestones is None
            else {name: rule.measured(once) for name, rule in self.milestones.items()},
        )

    @property
    def unseen(self) -> Any:
        """The loader of unseen samples that a rule needs, or None."""
        return next((rule.unseen for rule in self.rules if rule.unseen is not None), None)


def bisect(reached: Callable[[float], bool]) -> float:
    """The smallest t in (0, 1], to 2^-12, at which ``reached(t)``, which holds at 1, still does.

    Args:
        reached: moves the state to t and tells; it is last called with another t than is returned.
    """
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
