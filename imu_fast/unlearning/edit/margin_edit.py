"""Unlearning by one edit of the head instead of an ascent: ``method="margin_edit"`` (SPEC 5)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InfeasibleError
from imu_fast.model.outputs import Measurement
from imu_fast.unlearning.ascent.head import HeadProblem
from imu_fast.unlearning.depth import BISECTIONS, OnMilestone, StopRule
from imu_fast.unlearning.edit.program import margin_edit
from imu_fast.unlearning.result import UnlearnResult

logger = logging.getLogger("imu_fast")

# Points on the way from the trained to the edited head that the trajectory records.
_RECORDS = 8


class Edit:
    """Edits a head to each milestone, and to the stop rule; without either, every sample flips.

    Args:
        moment: the second moment [D, D] of the features that are to be disturbed least; None: of
            the forget features.
    """

    def __init__(
        self,
        problem: HeadProblem,
        settings: dict[str, Any],
        stop: StopRule | None,
        milestones: Mapping[str, StopRule],
        on_milestone: OnMilestone | None,
        watch: list[str],
        moment: Tensor | None,
    ) -> None:
        self.problem, self.settings, self.stop = problem, settings, stop
        self.milestones, self.on_milestone = milestones, on_milestone
        self.watch, self.moment = watch, moment
        self.trained = problem.theta.clone()
        self.trajectory: list[dict[str, float]] = []

    def measure(self, name: str) -> Measurement:
        """The problem's measurement at the current state."""
        return self.problem.measure(name)

    def run(self, model: nn.Module) -> UnlearnResult:
        """Edit; ``steps`` of the result is 1, ``step_fraction`` the scale of the edit kept."""
        n, device = self.problem.n, self.trained.device
        result = UnlearnResult(
            model, None, torch.arange(n), torch.ones(n, device=device), self.trajectory, steps=1
        )
        for name, rule in self.milestones.items():
            self._to(rule)
            if self.on_milestone is not None:
                self.problem.finish()
                self.on_milestone(name, self._entry(1.0))
        if self.stop is None and self.milestones:
            result.stopped_by = "milestones"
        else:
            result.indices, result.step_fraction, reached = self._to(self.stop)
            result.stopped_by = reached or "edit"
        return result

    def _entry(self, position: float) -> dict[str, float]:
        entry: dict[str, float] = {"step": position, "epoch": 0}
        for name in ("forget", *self.watch):
            measured = self.measure(name)
            entry |= {f"{name}_loss": measured.mean_loss, f"{name}_accuracy": measured.accuracy}
        return entry

    def _set(self, step: Tensor, scale: float) -> None:
        self.problem.theta.copy_(self.trained + scale * step)

    def _to(self, rule: StopRule | None) -> tuple[Tensor, float, str | None]:
        """Leave the problem at the depth; returns the samples edited, the scale and the condition.

        How many samples to flip follows from a target accuracy; another rule's is bisected.
        """
        n = self.problem.n
        self._set(self.trained, 0.0)
        if rule is not None and (already := rule.reached(self)):
            self.trajectory[:] = [self._entry(0.0)]
            return torch.arange(0), 0.0, already
        high = n
        if rule is not None and rule.forget_accuracy is not None:
            high = n - int(rule.forget_accuracy * n)
            step, chosen = self._solve(high)
        elif rule is not None:
            low = 0
            while high - low > max(1, n // 100):
                middle = (low + high) // 2
                self._set(self._solve(middle)[0], 1.0)
                low, high = (low, middle) if rule.reached(self) else (middle, high)
            step, chosen = self._solve(high)
        else:
            step, chosen = self._solve(high)
        self._set(step, 1.0)
        reached, scale = None, 1.0
        if rule is not None:
            reached = rule.reached(self)
            if reached is None:
                logger.warning("margin_edit of %d of %d samples does not reach the depth", high, n)
            else:
                scale = self._shrink(rule, step)
        self.trajectory.clear()
        for k in range(_RECORDS + 1):
            self._set(step, scale * k / _RECORDS)
            self.trajectory.append(self._entry(scale * k / _RECORDS))
        return chosen.cpu(), scale, reached

    def _solve(self, count: int) -> tuple[Tensor, Tensor]:
        """The edit [C, D] for ``count`` samples, and which they are.

        Samples already wrong come first, for free; where holding them so contradicts the others,
        only samples that still have their label are edited, which is always possible.
        """
        features, labels = self.problem.sets["forget"]
        try:
            return self._edit(features, labels, count)
        except InfeasibleError:
            right = torch.nonzero(self._measure_trained().correct).flatten()
            count = count - (len(labels) - len(right))
            logger.info("margin_edit leaves out %d samples already wrong", len(labels) - len(right))
            step, chosen = self._edit(features[right], labels[right], max(1, count))
            return step, right[chosen]

    def _measure_trained(self) -> Measurement:
        """The forget set's measurement before any edit."""
        self._set(self.trained, 0.0)
        return self.measure("forget")

    def _edit(self, features: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        found = margin_edit(
            features,
            labels,
            self.trained,
            self.problem.has_bias,
            count=count,
            margin=self.settings["margin"],
            eps=self.settings["precondition_eps"],
            second_moment=self.moment,
        )
        return found.step.to(self.trained), found.chosen

    def _shrink(self, rule: StopRule, step: Tensor) -> float:
        """The smallest scale, by bisection, at which the rule still holds."""
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            self._set(step, middle)
            low, high = (low, middle) if rule.reached(self) else (middle, high)
        return high
