"""Unlearning by one edit of the head instead of an ascent: a quadratic program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_fast.errors import InfeasibleError, InputError, check_positive
from imu_fast.model.head import find_head
from imu_fast.options import option, options
from imu_fast.unlearning.confirm import confirm
from imu_fast.unlearning.depth import StopRule, bisect
from imu_fast.unlearning.edit.program import smallest_edit
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import HeadSubject, check_head_layer
from imu_fast.unlearning.trajectory import Trajectory

logger = logging.getLogger("imu_fast")

# Points on the way from the trained to the edited head that the trajectory records.
_RECORDS = 8
# Edits one after the other of a head whose weight its own features depend on.
_ROUNDS = 10
# Multiples of an edit that are tried where it does not reach the depth.
_FURTHER = (1.25, 1.6, 2.0, 3.0)


def _check_moment(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise InputError(
            f"precondition={value!r} with method='margin_edit': pass the second moment [D, D] of "
            "the features that are to be disturbed least, or leave it out for the forget set's own"
        )


@options
class MarginEdit(Method):
    """The smallest disturbance of the head that leaves the forget samples' margins at ``-margin``.

    ``min 1/2 tr(dT (S + eps tr(S)/D I) dT^T)`` over the edit dT [C, D], S the second moment of the
    features that are to be disturbed least. How many samples are flipped follows from the stop
    rule; without one every sample is. (ROME and MEMIT edit language models by second moments of
    keys; this is their relative for a classifier.)

    Args:
        margin: by how much another class is to win, in logits.
        eps: damping of S, relative to its mean eigenvalue.
        moment: S [D, D], such as the training set's; None: the forget features' own.
        layer: the head, by name or as a module; None: found.
    """

    name = "margin_edit"
    margin: float = option(default=0.1, check=check_positive)
    eps: float = option(default=1e-2, check=check_positive, also="precondition_eps")
    moment: Tensor | None = option(default=None, check=_check_moment, also="precondition")
    layer: str | nn.Module | None = option(default=None, check=check_head_layer, also="layers")

    def bind(self, model: nn.Module) -> Self:
        return self if self.layer is None else replace(self, layer=find_head(model, self.layer)[0])

    def run(self, job: Job) -> UnlearnResult:
        subject = HeadSubject(job.model, self.layer, job.sets, job.progress, job.reading)
        job.keep([*subject.tensors(), *job.model.buffers()])
        return _Edit(self, subject, job).run()


class _Edit:
    """Edits a head to each milestone, and to the stop rule."""

    def __init__(self, method: MarginEdit, subject: HeadSubject, job: Job) -> None:
        self.method, self.subject, self.job = method, subject, job
        self.trained = subject.theta.clone()
        self.trajectory = Trajectory(subject, job.watch, job.callback)

    def run(self) -> UnlearnResult:
        """Edit; ``steps`` of the result is 1, ``step_fraction`` the scale of the edit kept."""
        n, device, depths = self.subject.n, self.trained.device, self.job.depths
        indices, scale, stopped_by = torch.arange(n), 1.0, "milestones"
        milestones = depths.milestones or {}
        reached = None
        for name, rule in milestones.items():
            step, indices, scale, reached = self._to(rule)
            if depths.on_milestone is not None:
                self.subject.finish()
                depths.on_milestone(name, self.trajectory.entry(scale, 0))
        if depths.stop is not None or not milestones:
            step, indices, scale, reached = self._to(depths.stop)
            stopped_by = reached or "edit"
        for k in range(_RECORDS + 1) if scale else (0,):
            self._set(step, scale * k / _RECORDS)
            self.trajectory.record(scale * k / _RECORDS, 0)
        last = depths.rules[-1] if depths.rules else None
        met = last if reached else None
        kept, own = confirm(self.subject, self.trajectory, met, scale, lambda t: self._set(step, t))
        if kept != scale:
            self.trajectory.records[-1]["step"] = scale = kept
        weights = torch.ones(len(indices), device=device)
        return UnlearnResult(
            self.job.model,
            None,
            indices,
            weights,
            self.trajectory.records,
            steps=1,
            stopped_by=stopped_by,
            step_fraction=scale,
            reached=None if last is None else own is not None,
        )

    def _set(self, step: Tensor, scale: float) -> None:
        self.subject.theta.copy_(self.trained + scale * step)
        self.trajectory.moved()

    def _holds(self, rule: StopRule, step: Tensor) -> Callable[[float], bool]:
        def reached(scale: float) -> bool:
            self._set(step, scale)
            return rule.reached(self.trajectory) is not None

        return reached

    def _to(self, rule: StopRule | None) -> tuple[Tensor, Tensor, float, str | None]:
        """Leave the head at the depth; the edit, its samples and scale, and the condition met.

        How many samples to flip follows from a target accuracy; another rule's is bisected.
        """
        n, nothing = self.subject.n, torch.zeros_like(self.trained)
        self._set(nothing, 0.0)
        if rule is not None and (already := rule.reached(self.trajectory)):
            return nothing, torch.arange(0), 0.0, already
        high = n
        if rule is not None and rule.accuracy is not None:
            high = n - int(rule.accuracy * n)
        elif rule is not None:
            low = 0
            while high - low > max(1, n // 100):
                middle = (low + high) // 2
                deep = self._holds(rule, self._solve(middle)[0])(1.0)
                low, high = (low, middle) if deep else (middle, high)
        step, chosen = self._solve(high)
        self._set(step, 1.0)
        if rule is None:
            return step, chosen.cpu(), 1.0, None
        for _ in range(_ROUNDS if self.subject.tied else 0):
            if rule.reached(self.trajectory):
                break
            # The edit moved its own features: another from where they are now.
            self.subject.capture_again()
            more, chosen = self._solve(high, self.subject.theta.clone())
            step = step + more
            self._set(step, 1.0)
        reached = rule.reached(self.trajectory)
        for further in _FURTHER if reached is None else ():
            # A half-precision head may round the edit short of its margins.
            if self._holds(rule, further * step)(1.0):
                step, reached = further * step, rule.reached(self.trajectory)
                break
        if reached is None:
            self._set(step, 1.0)
            return step, chosen.cpu(), 1.0, None
        scale = bisect(self._holds(rule, step))
        self._set(step, scale)
        return step, chosen.cpu(), scale, reached

    def _solve(self, count: int, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The edit [C, D] of theta (as trained) for ``count`` samples, and which they are.

        Samples already wrong come first, for free; where holding them so contradicts the others,
        only samples that still have their label are edited, which is always possible.
        """
        features, labels = self.subject.sets["forget"]
        theta = self.trained if theta is None else theta
        try:
            return self._edit(features, labels, theta, count)
        except InfeasibleError:
            self._set(torch.zeros_like(self.trained), 0.0)
            right = torch.nonzero(self.trajectory.measure("forget").correct).flatten()
            count = count - (len(labels) - len(right))
            logger.info("margin_edit leaves out %d samples already wrong", len(labels) - len(right))
            step, chosen = self._edit(features[right], labels[right], theta, max(1, count))
            return step, right[chosen]

    def _edit(
        self, features: Tensor, labels: Tensor, theta: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        found = smallest_edit(
            features,
            labels,
            theta,
            self.subject.has_bias,
            count=count,
            margin=self.method.margin,
            eps=self.method.eps,
            second_moment=self.method.moment,
        )
        return found.step.to(self.trained), found.chosen
