"""What methods share that move a head along one direction: depths, records, the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imu_fast.unlearning.confirm import confirm
from imu_fast.unlearning.depth import StopRule
from imu_fast.unlearning.method import Job
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import HeadSubject
from imu_fast.unlearning.trajectory import Trajectory

# Points on the way from the trained to the edited head that the trajectory records.
_RECORDS = 8


@dataclass(frozen=True)
class Move:
    """Where a head was moved: to ``start + scale * step``.

    Attributes:
        step: [C, D]. chosen: [k], the samples that it is made of, on the CPU.
        scale: in [0, 1]. unit: what a scale of one counts as, in records and in the result.
        reached: the condition that is met, or None.
        start: [C, D], where another step has led before; None: the trained head.
        before: what that step counts as, in records.
    """

    step: Tensor
    chosen: Tensor
    scale: float
    reached: str | None
    unit: float = 1.0
    start: Tensor | None = None
    before: float = 0.0

    def at(self, scale: float) -> float:
        """What a scale counts as."""
        return self.before + self.unit * scale


class StraightEdit(ABC):
    """Moves a head to each milestone, and to the stop rule, from where it is.

    Attributes:
        trained: [C, D], the head as it was. trajectory: of all measurements and records.
        said: what the result is to say of the run, beside the method's options.
    """

    def __init__(self, subject: HeadSubject, job: Job) -> None:
        self.subject, self.job = subject, job
        self.trained = subject.theta.clone()
        self.trajectory = Trajectory(subject, job.watch, job.callback)
        self.said: dict[str, Any] = {}

    @abstractmethod
    def to(self, rule: StopRule | None) -> Move:
        """Leave the head at the depth; None: at all that the method does of itself."""

    def run(self) -> UnlearnResult:
        """``steps`` of the result is 1, ``step_fraction`` how much is kept; both 0 of no edit."""
        depths, stopped_by = self.job.depths, "milestones"
        milestones = depths.milestones or {}
        move = Move(torch.zeros_like(self.trained), torch.arange(0), 0.0, None)
        for name, rule in milestones.items():
            move = self.to(rule)
            if depths.on_milestone is not None:
                self.subject.finish()
                depths.on_milestone(name, self.trajectory.entry(move.at(move.scale), 0))
        if depths.stop is not None or not milestones:
            move = self.to(depths.stop)
            stopped_by = move.reached or "edit"
        if move.start is not None:
            self.set(move.step, 0.0)
            self.trajectory.record(0.0, 0)
        for k in range(_RECORDS + 1) if move.scale else (0,):
            part = move.scale * k / _RECORDS
            self.set(move.step, part, move.start)
            self.trajectory.record(move.at(part), 0)
        last = depths.rules[-1] if depths.rules else None
        kept, own = confirm(
            self.subject,
            self.trajectory,
            last if move.reached else None,
            move.scale,
            lambda t: self.set(move.step, t, move.start),
        )
        if kept != move.scale:
            self.trajectory.records[-1]["step"] = move.at(kept)
        return UnlearnResult(
            self.job.model,
            None,
            move.chosen,
            torch.ones(len(move.chosen), device=self.trained.device),
            self.trajectory.records,
            steps=int(kept > 0 or move.start is not None),
            stopped_by=stopped_by,
            step_fraction=move.unit * kept,
            reached=None if last is None else own is not None,
            settings=self.said,
        )

    def set(self, step: Tensor, scale: float, start: Tensor | None = None) -> None:
        """Move the head to ``start + scale * step``, start being the trained head, or another."""
        self.subject.theta.copy_((self.trained if start is None else start) + scale * step)
        self.trajectory.moved()

    def holds(self, rule: StopRule, step: Tensor) -> Callable[[float], bool]:
        """Whether the rule is met at a scale of the step, to which the head is moved."""

        def reached(scale: float) -> bool:
            self.set(step, scale)
            return rule.reached(self.trajectory) is not None

        return reached

    def already(self, rule: StopRule | None) -> Move | None:
        """No move, where the rule is met before any."""
        nothing = torch.zeros_like(self.trained)
        self.set(nothing, 0.0)
        met = None if rule is None else rule.reached(self.trajectory)
        return None if met is None else Move(nothing, torch.arange(0), 0.0, met)
