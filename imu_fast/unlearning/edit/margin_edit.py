"""Unlearning by one edit of the head instead of an ascent: a quadratic program."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_fast.errors import InfeasibleError, InputError, check_choice, check_positive
from imu_fast.model.head import find_head
from imu_fast.options import option, options
from imu_fast.unlearning.depth import StopRule, bisect
from imu_fast.unlearning.edit.metric import FeatureMetric, HessianMetric, Metric
from imu_fast.unlearning.edit.program import smallest_edit
from imu_fast.unlearning.edit.straight import Move, StraightEdit
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import HeadSubject, check_head_layer
from imu_fast.unlearning.summary.hessian import head_hessian
from imu_fast.unlearning.summary.summary import TrainingSummary, check_summary

logger = logging.getLogger("imu_fast")

# Edits one after the other of a head whose weight its own features depend on.
_ROUNDS = 10
# Multiples of an edit that are tried where it does not reach the depth.
_FURTHER = (1.25, 1.6, 2.0, 3.0)

MetricName = Literal["features", "ggn"]


def _check_metric(name: str, value: Any) -> None:
    if value is not None:
        check_choice(name, value, ("features", "ggn"))


def _check_moment(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise InputError(
            f"precondition={value!r} with method='margin_edit': pass the second moment [D, D] of "
            "the features that are to be disturbed least, or leave it out for the forget set's own"
        )


@options
class MarginEdit(Method):
    """The smallest disturbance of the head that leaves the forget samples' margins at ``-margin``.

    ``min 1/2 <dT, H dT>`` over the edit dT [C, D]. H says what is to be disturbed least: outputs,
    all alike, by the second moment S of the features (``I (x) (S + eps tr(S)/D I)``), or the loss
    to second order, by a GGN. Each is the training set's with a summary of it, else the forget
    set's own. How many samples are flipped follows from the stop rule; without one every sample
    is. (ROME and MEMIT edit language models by second moments of keys; this is their relative for a
    classifier.)

    Args:
        margin: by how much another class is to win, in logits.
        metric: ``"features"`` or ``"ggn"``; None: the GGN with a summary, features without.
        eps: damping of S or of the GGN, relative to its mean eigenvalue; a summary's weight decay
            is added to its GGN.
        summary: of the training set, by :func:`imu_fast.save_summary`.
        moment: S [D, D] of other data, in the place of the forget features' own.
        layer: the head, by name or as a module; None: found.
    """

    name = "margin_edit"
    margin: float = option(default=0.1, check=check_positive)
    metric: MetricName | None = option(default=None, check=_check_metric)
    eps: float = option(default=1e-2, check=check_positive, also="precondition_eps")
    summary: TrainingSummary | None = option(default=None, check=check_summary)
    moment: Tensor | None = option(default=None, check=_check_moment, also="precondition")
    layer: str | nn.Module | None = option(default=None, check=check_head_layer, also="layers")

    def check(self) -> None:
        """Of two things that say what S is, one."""
        if self.moment is not None and self.summary is not None:
            raise InputError(
                "moment (precondition) with summary, which has a second moment of its own; leave "
                "one of the two out"
            )
        if self.moment is not None and self.metric == "ggn":
            raise InputError(
                "moment (precondition) with metric='ggn': a second moment is of "
                "metric='features'; leave one of the two out"
            )

    def bind(self, model: nn.Module) -> Self:
        return self if self.layer is None else replace(self, layer=find_head(model, self.layer)[0])

    def run(self, job: Job) -> UnlearnResult:
        subject = HeadSubject(job.model, self.layer, job.sets, job.progress, job.reading)
        if self.summary is not None:
            self.summary.check_head(job.model, subject.trained, subject.has_bias, subject.n)
        job.keep([*subject.tensors(), *job.model.buffers()])
        return Edit(self, subject, job).run()


class Edit(StraightEdit):
    """Edits a head to each milestone, and to the stop rule.

    Args:
        metric: H; None: what the method says.
    """

    def __init__(
        self, method: MarginEdit, subject: HeadSubject, job: Job, metric: Metric | None = None
    ) -> None:
        super().__init__(subject, job)
        self.method = method
        self._metric = metric or self._stated_metric()

    def _stated_metric(self) -> Metric | None:
        """H; None: by the second moment that is given, or the edited features' own."""
        method, summary = self.method, self.method.summary
        device = self.trained.device
        name = method.metric or ("features" if summary is None else "ggn")
        if name == "ggn":
            if summary is not None:
                hessian = summary.hessian.to(device)
                damping = summary.n * summary.weight_decay
            else:
                [factors] = self.subject.factors()
                hessian, damping = head_hessian(factors), 0.0
            metric: Metric = HessianMetric.of(hessian, method.eps, damping)
        elif summary is not None:
            metric = FeatureMetric(summary.second_moment.to(device), method.eps)
        else:
            return None
        whose = "forget" if summary is None else "training"
        self.said = {"metric": f"{name} of the {whose} set"}
        if isinstance(metric, HessianMetric):
            self.said |= {"hessian": hessian.kind, "damping": metric.damped.damping}
        return metric

    def to(self, rule: StopRule | None) -> Move:
        """Leave the head at the depth.

        How many samples to flip follows from a target accuracy; another rule's is bisected.
        """
        if (done := self.already(rule)) is not None:
            return done
        n = self.subject.n
        high = n
        if rule is not None and rule.accuracy is not None:
            high = n - int(rule.accuracy * n + 1e-9)  # 0.29 of 100 are 29, and no rounding less
        elif rule is not None:
            low = 0
            while high - low > max(1, n // 100):
                middle = (low + high) // 2
                deep = self.holds(rule, self._solve(middle)[0])(1.0)
                low, high = (low, middle) if deep else (middle, high)
        step, chosen = self._solve(high)
        self.set(step, 1.0)
        if rule is None:
            return Move(step, chosen.cpu(), 1.0, None)
        for _ in range(_ROUNDS if self.subject.tied else 0):
            if rule.reached(self.trajectory):
                break
            # The edit moved its own features: another from where they are now.
            self.subject.capture_again()
            more, chosen = self._solve(high, self.subject.theta.clone())
            step = step + more
            self.set(step, 1.0)
        reached = rule.reached(self.trajectory)
        for further in _FURTHER if reached is None else ():
            # A half-precision head may round the edit short of its margins.
            if self.holds(rule, further * step)(1.0):
                step, reached = further * step, rule.reached(self.trajectory)
                break
        if reached is None:
            self.set(step, 1.0)
            return Move(step, chosen.cpu(), 1.0, None)
        scale = bisect(self.holds(rule, step))
        self.set(step, scale)
        return Move(step, chosen.cpu(), scale, reached)

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
            self.set(torch.zeros_like(self.trained), 0.0)
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
            metric=self._metric,
        )
        return found.step.to(self.trained), found.chosen
