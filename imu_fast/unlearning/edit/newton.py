"""Unlearning by one Newton step: what training without the forget samples would do to the head."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_fast.errors import InputError, check_positive, one_of
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.model.head import find_head
from imu_fast.options import option, options
from imu_fast.unlearning.depth import StopRule, bisect
from imu_fast.unlearning.edit.inverse import damped_inverse
from imu_fast.unlearning.edit.margin_edit import Edit, MarginEdit
from imu_fast.unlearning.edit.metric import HessianMetric
from imu_fast.unlearning.edit.straight import Move, StraightEdit
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import HeadSubject, check_head_layer
from imu_fast.unlearning.summary.hessian import Damped, HeadHessian, head_hessian
from imu_fast.unlearning.summary.summary import TrainingSummary, check_summary

logger = logging.getLogger("imu_fast")

# The direction is doubled or halved this often at most to find a scale that reaches the depth.
_DOUBLINGS = 24

Then = Literal["scale", "margin_edit"]


def _check_if_given(name: str, value: Any) -> None:
    if value is not None:
        check_positive(name, value)


@options
class NewtonRemoval(Method):
    """What removing the forget samples from training does to the head, to second order.

    With H the undamped sum of the head's GGN over the N training samples, H_F that over the n
    forget samples, both at the trained head theta, and lam the weight decay of the mean training
    loss::

        theta + k (H - H_F + (N - n) lam I)^-1 (sum_F g_i + n lam theta)

    The gradient of what is left of the summed loss is ``-(sum_F g_i + n lam theta)`` at its optimum
    with the forget samples, and the inverse is of its Hessian: one Newton step towards the head
    that training without them would have found on the same features (Guo et al. 2020). k is 1 by
    this derivation, and with a stop rule what reaches the depth, or is left to the margin edit.

    Without a summary the direction is ``(H_F + eps mu I)^-1 sum_F g_i``, whose scale means nothing:
    a depth is needed.

    Args:
        summary: of the training set, by :func:`imu_fast.save_summary`; the forget samples are to be
            among those that it is of, read in the same way.
        eps: numerical damping, relative to mu, the mean eigenvalue of the undamped matrix that is
            inverted. Where that is not positive definite it is raised, to a tenth at most, with a
            warning; ``result.settings["damping"]`` is what was used, weight decay included.
        k: how much of the step is made where no depth says it; None: 1.
        then: how a depth is reached: ``"scale"``: by k alone; ``"margin_edit"``: k of the step, or
            less where that is enough, and from there :class:`MarginEdit` in the metric of the
            Hessian of what is left. Along one direction a small k goes towards the retrained head
            and a large one past it.
        margin: of that margin edit; None: its default.
        layer: the head, by name or as a module; None: found.
    """

    name = "newton_removal"
    summary: TrainingSummary | None = option(default=None, check=check_summary)
    eps: float = option(default=1e-2, check=check_positive)
    k: float | None = option(default=None, check=_check_if_given)
    then: Then = option(default="scale", check=one_of("scale", "margin_edit"))
    margin: float | None = option(default=None, check=_check_if_given)
    layer: str | nn.Module | None = option(default=None, check=check_head_layer, also="layers")

    def check(self) -> None:
        """What has no meaning without a summary is not taken without."""
        if self.summary is None and (self.k is not None or self.then != "scale"):
            what = f"k={self.k!r}" if self.k is not None else f"then={self.then!r}"
            raise InputError(
                f"{what} with method='newton_removal' and no summary: the scale of the step means "
                "nothing then; pass summary=imu_fast.load_summary(...), or leave it out"
            )
        if self.margin is not None and self.then != "margin_edit":
            raise InputError(
                f"margin={self.margin!r} with then='scale', which edits no margins; pass "
                "then='margin_edit', or leave it out"
            )

    def bind(self, model: nn.Module) -> Self:
        return self if self.layer is None else replace(self, layer=find_head(model, self.layer)[0])

    def run(self, job: Job) -> UnlearnResult:
        if self.summary is None and not job.depths.rules:
            raise InputError(
                "stop=None with method='newton_removal' and no summary: the forget set alone gives "
                "a direction and no scale; pass summary=imu_fast.load_summary(...) of the training "
                "set, or a depth, stop=imu_fast.StopRule(unseen_accuracy=X)"
            )
        if self.then == "margin_edit" and not job.depths.rules:
            raise InputError(
                "then='margin_edit' without a depth, which says what is left to edit; pass "
                "stop=imu_fast.StopRule(unseen_accuracy=X), or leave it out for the step alone"
            )
        if self.k is not None and self.then == "scale" and job.depths.rules:
            raise InputError(
                f"k={self.k!r} with a stop rule or milestones, whose depth says what k is; leave "
                "one out, or pass then='margin_edit', which makes k of the step and an edit for "
                "the rest"
            )
        subject = HeadSubject(job.model, self.layer, job.sets, job.progress, job.reading)
        if subject.tied:
            raise InputError(
                f"method='newton_removal': the head {subject.name!r} shares its weight with "
                f"{', '.join(subject.tied)}, so its features change with it, and the step is of "
                "features that stay; use method='imu' or 'margin_edit', or untie the weight"
            )
        if self.summary is not None:
            self.summary.check_head(job.model, subject.trained, subject.has_bias, subject.n)
        job.keep([*subject.tensors(), *job.model.buffers()])
        return _Removal(self, subject, job).run()


def removal_step(
    theta: Tensor, factors: GradientFactors, summary: TrainingSummary | None, eps: float
) -> tuple[Tensor, HeadHessian, Damped]:
    """The step of k = 1, [C, D], float64; the undamped matrix, and what was inverted.

    Args:
        theta: [C, D], float64. factors: of the forget set at theta, float64.
        eps: see :class:`NewtonRemoval`.

    Raises:
        InputError: the matrix is zero. SingularMatrixError: it is indefinite by more than
            rounding.
    """
    gradient = factors.n * factors.mean_gradient()
    lam, left = 0.0, 0
    if summary is None:
        hessian = head_hessian(factors)
    else:
        whole = summary.hessian.to(theta.device)
        hessian = whole - head_hessian(factors, whole.kind)
        lam, left = summary.weight_decay, summary.n - factors.n
        gradient = gradient + factors.n * lam * theta
    inverse = damped_inverse(hessian, left * lam, eps, NewtonRemoval.name)
    return inverse.solve(gradient), hessian, inverse


class _Removal(StraightEdit):
    """Moves a head along the step: all of it, or to a depth."""

    def __init__(self, method: NewtonRemoval, subject: HeadSubject, job: Job) -> None:
        super().__init__(subject, job)
        (features, labels), theta = subject.sets["forget"], self.trained.double()
        d = features.shape[1]
        factors = GradientFactors.from_head(
            features.double(),
            theta[:, :d],
            theta[:, d] if subject.has_bias else None,
            labels,
            implicit=False,
        )
        step, hessian, inverse = removal_step(theta, factors, method.summary, method.eps)
        self._k = 1.0 if method.k is None else float(method.k)
        self._step, self._inverse = step.to(self.trained), inverse
        self._edits, self._edit = method.then == "margin_edit", MarginEdit()
        if method.margin is not None:
            self._edit = MarginEdit(margin=method.margin)
        self.said = {"hessian": hessian.kind, "damping": inverse.damping}

    def to(self, rule: StopRule | None) -> Move:
        """Leave the head at the depth; None: at k."""
        step = self._k * self._step
        if rule is None:
            self.set(step, 1.0)
            return self._moved(step, 1.0, None, self._k)
        if (done := self.already(rule)) is not None:
            return done
        if self._edits and not self.holds(rule, step)(1.0):
            return self._edited(rule, self.trained + step)
        k = self._k if self._edits else self._deep_enough(rule)
        step = k * self._step
        if not self.holds(rule, step)(1.0):
            return self._moved(step, 1.0, None, k)
        scale = bisect(self.holds(rule, step))
        self.set(step, scale)
        return self._moved(step, scale, rule.reached(self.trajectory), k)

    def _moved(self, step: Tensor, scale: float, reached: str | None, k: float) -> Move:
        return Move(step, torch.arange(self.subject.n), scale, reached, unit=k)

    def _deep_enough(self, rule: StopRule) -> float:
        """A k that reaches the depth while its half does not; 1 where none does."""
        reaches, k = self.holds(rule, self._step), 1.0
        if reaches(k):
            while k > 2.0**-_DOUBLINGS and reaches(k / 2):
                k /= 2
            return k
        while k < 2.0**_DOUBLINGS and not reaches(k):
            k *= 2
        return k if reaches(k) else 1.0

    def _edited(self, rule: StopRule, start: Tensor) -> Move:
        """From there to the depth by the margin edit, in the metric of what is left."""
        self.subject.theta.copy_(start)
        edit = Edit(self._edit, self.subject, self.job, HessianMetric(self._inverse))
        edit.trajectory = self.trajectory
        move = edit.to(rule)
        return replace(move, chosen=torch.arange(self.subject.n), start=start, before=self._k)
