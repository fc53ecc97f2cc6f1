"""Leave-one-out of a head in closed form: what it would say of each sample, trained without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.attribution.newton import Objective, Point
from imu_fast.distributed import Group
from imu_fast.errors import InputError, check_choice, check_flag, check_positive
from imu_fast.factors.probabilities import augmented
from imu_fast.losses.base import Loss
from imu_fast.model.capture import HeadFeatures, capture_features
from imu_fast.model.guard import door
from imu_fast.model.head import say_of_weight
from imu_fast.model.reading import ReadingOptions
from imu_fast.ops.tokens import is_flat

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LeaveOneOut:
    """What :func:`leave_one_out` found; all float64, n samples, C classes, d features.

    Attributes:
        logits: [n, C], of each sample by the head trained without it.
        losses: [n], at those logits; their mean is the leave-one-out estimate of the test loss.
        labels: [n].
        head_logits: [n, C], by the head trained with all of them.
        weight, bias: that head, [C, d] and [C] or None: the model's, or refitted.
        gradient_norm: of the objective at that head.
        distance: how far it is from its optimum, in units of what a sample moves it (both in the
            norm of the Hessian): a quarter of one is far.
    """

    logits: Tensor
    losses: Tensor
    labels: Tensor
    head_logits: Tensor
    weight: Tensor
    bias: Tensor | None
    gradient_norm: float
    distance: float
    _solve: _Solve = field(repr=False)

    def parameters(self, samples: Sequence[int] | Tensor) -> Tensor:
        """``[W, b]`` of the heads trained without each of these samples: [k, C, D].

        D is d + 1 with a bias, else d. Logits of other data, [m, C] of each, are
        ``torch.einsum("kcd,md->kmc", parameters, augmented features)``.
        """
        return self._solve(torch.as_tensor(samples, device=self.logits.device).flatten())


@door
def leave_one_out(
    model: nn.Module,
    data: Any,
    *,
    weight_decay: float,
    reduction: Reduction = "mean",
    decay_bias: bool = True,
    refit: bool = False,
    tolerance: float = 0.1,
    head: Any = "head",
    progress: bool = False,
    group: Group = None,
    **reading: Unpack[ReadingOptions],
) -> LeaveOneOut:
    """What the head would say of each sample had it been trained without it; no retraining.

    One Newton step on the objective without the sample, with that objective's exact Hessian:
    ``theta_-i = theta + (H - H_i)^-1 (g_i - r)``, r the gradient that is left at theta (approximate
    leave-one-out: Beirami et al. 2017, Rad & Maleki 2020). Exact where the loss is quadratic, else
    up to the square of the change. ``H_i = B_i (x) a~_i a~_i^T`` is of rank C at most, so that
    H is inverted once and each sample costs a system of C equations (Woodbury); nothing of size
    n x P is formed.

    Args:
        model: its features are taken as they are; only the head is thought to be retrained. An
            nn.Linear is a model, too, and its inputs are features.
        data: the head's n training samples, in any form that :func:`imu_fast.capture` reads.
        weight_decay: lam > 0 of the head's training objective:
        reduction: "mean": ``1/n sum_i l_i + lam/2 ||theta||^2`` (torch's loss and ``weight_decay``
            of SGD), over n - 1 samples where one is left out; "sum": ``sum_i l_i + lam/2
            ||theta||^2`` (scikit-learn's, with ``C = 1/lam``).
        decay_bias: whether theta has the bias in it (torch's); scikit-learn's has not.
        refit: put the head at the optimum of that objective first, by Newton's method. Without it
            the head must be there already.
        tolerance: of the head's ``distance`` from its optimum, see :class:`LeaveOneOut`.
        head, group, reading: as in :func:`imu_fast.capture_features`.

    Returns:
        A :class:`LeaveOneOut`. It holds H^-1, ``(C D)^2`` numbers, D no more than n + 1.

    Raises:
        InputError: the head is not at its optimum; something stands between it and the logits;
            samples with no label, or several; fewer than two; a Hessian of order beyond 20,000;
            and as :func:`imu_fast.capture_features`.
        SingularMatrixError: the Hessian is not positive definite in float64.
    """
    check_positive("weight_decay", weight_decay)
    check_choice("reduction", reduction, get_args(Reduction))
    check_flag("decay_bias", decay_bias)
    check_flag("refit", refit)
    check_positive("tolerance", tolerance)
    found = capture_features(model, data, head, progress=progress, group=group, **reading)
    _check(found)
    loss = found.loss
    assert loss is not None
    for part, _ in found.parts:
        say_of_weight(model, part)
    wide = torch.device("cpu") if found.features.device.type == "mps" else found.features.device
    linear, labels = found.head, found.labels.to(wide)
    bias = linear.bias is not None
    theta = linear.weight.detach().to(wide, torch.float64)
    if bias:
        theta = torch.cat([theta, linear.bias.detach().to(theta)[:, None]], dim=1)
    act = found.features.detach().to(wide, torch.float64)
    left_out = _Without(act, theta, labels, loss, bias, weight_decay, reduction, decay_bias)
    return left_out.result(refit, tolerance)


def _check(found: HeadFeatures) -> None:
    if found.between or not found.linear or len(found.parts) > 1:
        raise InputError(
            f"between the head {found.name!r} and the logits: {found.between or 'several layers'}; "
            "leave_one_out needs logits that are one layer's output, or pass that layer as the "
            "model and its inputs as data"
        )
    if not is_flat(found.offsets):
        counts = found.offsets.diff()
        bad = int(torch.nonzero(counts != 1)[0])
        raise InputError(
            f"data: sample {bad} has {int(counts[bad])} labels; each sample needs a label, and no "
            "more than one: leave the others out"
        )
    if len(found.labels) < 2:
        raise InputError("data has one sample, without which nothing is left; pass at least two")


class _Without:
    """The objective, and its Newton step without each sample.

    Args:
        act: [n, d]. theta: [C, D]. Both float64.
    """

    def __init__(
        self,
        act: Tensor,
        theta: Tensor,
        labels: Tensor,
        loss: Loss,
        has_bias: bool,
        weight_decay: float,
        reduction: str,
        decay_bias: bool = True,
    ) -> None:
        n, d = act.shape
        self.act, self.labels, self.has_bias, self.theta = act, labels, has_bias, theta
        self.scale = n if reduction == "mean" else 1
        # Of the span of few samples' features alone: what theta has beside it decays to zero.
        self.basis = torch.linalg.qr(act.T)[0] if n < d else None
        a = augmented(act if self.basis is None else act @ self.basis, has_bias)
        decayed = torch.ones_like(a[0])
        decayed[-1:] -= float(has_bias and not decay_bias)
        self.objective = Objective(a, labels, loss, weight_decay * self.scale * decayed)
        rest = n - 1 if reduction == "mean" else 1
        self.decay = weight_decay * rest * decayed

    def _inside(self, theta: Tensor) -> Tensor:
        """[C, D] to [C, D] of the span."""
        if self.basis is None:
            return theta
        d = len(self.basis)
        return torch.cat([theta[:, :d] @ self.basis, theta[:, d:]], dim=1)

    def outside(self, theta: Tensor) -> Tensor:
        """The other way; theta [..., D]."""
        if self.basis is None:
            return theta
        k = self.basis.shape[1]
        return torch.cat([theta[..., :k] @ self.basis.T, theta[..., k:]], dim=-1)

    def result(self, refit: bool, tolerance: float) -> LeaveOneOut:
        theta, inside = self.theta, self._inside(self.theta)
        if refit:
            point = self.objective.optimum(inside)
            theta = self.outside(point.theta)
        else:
            point = self.objective.at(inside)
        gradient = point.gradient
        beside = theta - self.outside(point.theta)
        norm = torch.linalg.vector_norm(gradient).hypot(
            torch.linalg.vector_norm(beside) * self.objective.decay[0]
        )
        inverse = torch.cholesky_inverse(point.factor(self.decay))
        common = (self.objective.decay - self.decay) * point.theta - gradient
        change, weights, moved = _changes(point, inverse, common)
        left = float(gradient.flatten() @ inverse @ gradient.flatten()) + float(
            beside.square().sum() * self.objective.decay[0]
        )
        distance = (left / moved) ** 0.5 if left else 0.0
        found = float(norm) / self.scale
        if distance > tolerance:
            raise InputError(
                f"the head is not at the optimum of this objective: its gradient's norm is "
                f"{found:.3g}, and it is {distance:.3g} times as far from it as one sample moves "
                f"it (tolerance={tolerance:g}); name the weight_decay, reduction and decay_bias "
                "that it was trained with, train it on, or pass refit=True"
            )
        logits, d = point.logits + change, self.act.shape[1]
        return LeaveOneOut(
            logits,
            self.objective.loss.residual(logits, self.labels, None)[1],
            self.labels,
            point.logits,
            theta[:, :d],
            theta[:, d] if self.has_bias else None,
            found,
            distance,
            _Solve(self, point.theta, inverse, weights, common),
        )


def _changes(point: Point, inverse: Tensor, common: Tensor) -> tuple[Tensor, Tensor, float]:
    """How leaving each sample out changes its logits, and what makes that of H.

    With ``A_i = (I (x) a~_i)^T H^-1 (I (x) a~_i)`` the change is
    ``u_i = (I - A_i B_i)^-1 (A_i delta_i + (H^-1 s) a~_i)``, and that of theta
    ``H^-1 ((B_i u_i + delta_i) (x) a~_i + s)``.

    Args:
        inverse: H^-1 [P, P] of all samples, with the weight decay that is left without one.
        common: s [C, D], what every left-out objective's gradient has of its own.

    Returns:
        u [n, C], ``B_i u_i + delta_i`` [n, C], and the mean of ``g_i^T H^-1 g_i``.
    """
    a, (classes, width) = point.objective.a, common.shape
    blocks = inverse.view(classes, width, classes, width)
    shift = a @ (inverse @ common.flatten()).view(classes, width).T
    change, weights, moved = torch.empty_like(shift), torch.empty_like(shift), 0.0
    for rows, b in point.chunks():
        leverage = torch.empty_like(b)
        for c in range(classes):
            product = (a[rows] @ blocks[c, :, c:].reshape(width, -1)).view(len(b), -1, width)
            leverage[:, c, c:] = (product @ a[rows, :, None])[..., 0]
            leverage[:, c:, c] = leverage[:, c, c:]
        delta = point.delta[rows, :, None]
        own = leverage @ delta
        moved += float((own * delta).sum())
        system = torch.eye(classes).to(b) - leverage @ b
        u = torch.linalg.solve(system, own + shift[rows, :, None])
        change[rows], weights[rows] = u[..., 0], (b @ u + delta)[..., 0]
    return change, weights, moved / len(a)


@dataclass(frozen=True)
class _Solve:
    without: _Without
    theta: Tensor
    inverse: Tensor
    weights: Tensor
    common: Tensor

    def __call__(self, samples: Tensor) -> Tensor:
        a = self.without.objective.a
        v = self.weights[samples, :, None] * a[samples, None, :] + self.common
        x = (v.flatten(1) @ self.inverse).view_as(v)
        return self.without.outside(self.theta + x)
