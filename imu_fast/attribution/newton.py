"""A head's training objective with weight decay, its Newton steps and its optimum; in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.losses.base import Loss
from imu_fast.losses.output_curvature import OutputCurvature, Softmax, StoredCurvature

# Elements of the [samples, C, D] or [samples, C, C] slabs that exist at once: 32 MB.
_SLAB = 1 << 22
# Order of the matrix that is inverted: 3.2 GB, twice.
MAX_ORDER = 20_000
_ITERATIONS = 100
_SUFFICIENT = 1e-4
# What is left of the gradient at the optimum, relative to the sum of magnitudes in it.
_STATIONARY = 1e-12


@dataclass(frozen=True)
class Objective:
    """``sum_i l(theta a~_i, y_i) + 1/2 sum_ck decay_k theta_ck^2``.

    Attributes:
        a: [n, D], float64, augmented. labels: [n]. decay: [D].
    """

    a: Tensor
    labels: Tensor
    loss: Loss
    decay: Tensor

    def at(self, theta: Tensor) -> Point:
        """Signal and losses there; theta [C, D]."""
        logits = self.a @ theta.T
        return Point(self, theta, logits, *self.loss.residual(logits, self.labels, None))

    def optimum(self, theta: Tensor) -> Point:
        """Newton's method with backtracking, from theta.

        Raises:
            InputError: no convergence: there may be no optimum.
            SingularMatrixError: the Hessian is singular.
        """
        point = self.at(theta)
        for _ in range(_ITERATIONS):
            g = point.gradient
            terms = point.delta.abs().T @ self.a.abs() + (self.decay * point.theta).abs()
            if float(g.abs().amax()) <= _STATIONARY * float(terms.amax()):
                return point
            step = torch.cholesky_solve(g.reshape(-1, 1), point.factor(self.decay)).view_as(g)
            slope, size, value = float((g * step).sum()), 1.0, point.value
            while True:
                following = self.at(point.theta - size * step)
                # The last digits of a sum do not tell which of two neighbours is lower.
                rounding = 1e-13 * abs(value)
                if following.value <= value - _SUFFICIENT * size * slope + rounding:
                    break
                size /= 2
            point = following
        raise InputError(
            f"refit=True found no optimum in {_ITERATIONS} Newton steps; raise weight_decay"
        )


@dataclass(frozen=True)
class Point:
    """An objective at theta [C, D]; logits and delta [n, C], losses [n], and what these keep."""

    objective: Objective
    theta: Tensor
    logits: Tensor
    delta: Tensor
    losses: Tensor
    kept: StoredCurvature

    @property
    def value(self) -> float:
        """The objective."""
        decay = (self.objective.decay * self.theta.square()).sum()
        return float(self.losses.sum() + 0.5 * decay)

    @property
    def gradient(self) -> Tensor:
        """Of the objective: [C, D]."""
        return self.delta.T @ self.objective.a + self.objective.decay * self.theta

    @cached_property
    def _outputs(self) -> OutputCurvature:
        ones = torch.ones_like(self.losses)
        return self.kept.resolved(self.delta, self.objective.labels, ones)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """``(samples, B_i [k, C, C])``, the loss's second derivative in the outputs."""
        (n, classes), width = self.delta.shape, self.objective.a.shape[1]
        step = max(1, _SLAB // (classes * max(classes, width)))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            yield rows, self._outputs.map(lambda x, r=rows: x[r]).matrices()  # type: ignore[misc]

    @cached_property
    def _curvature(self) -> Tensor:
        """``sum_i B_i (x) a~_i a~_i^T``: [C, D, C, D]."""
        a, classes = self.objective.a, self.delta.shape[1]
        width = a.shape[1]
        out = a.new_zeros(classes, width, classes, width)
        for rows, blocks in self.chunks():
            for c in range(classes):
                right = a[rows, None, :] * blocks[:, c, c:, None]
                sums = a[rows].T @ right.flatten(1)
                out[c, :, c:] += sums.view(width, classes - c, width)
        for c in range(classes):
            for e in range(c):
                out[c, :, e] = out[e, :, c].T
        return out

    def factor(self, decay: Tensor) -> Tensor:
        """Lower Cholesky factor [P, P] of the Hessian with this weight decay [D], P = C D.

        A parameter without decay that all classes may be moved along without a change of the
        softmax (a common bias) is held where it is.

        Raises:
            InputError: P is beyond MAX_ORDER.
            SingularMatrixError: it is not positive definite.
        """
        classes, width = self.theta.shape
        order = classes * width
        if order > MAX_ORDER:
            raise InputError(
                f"the head's Hessian has order C D = {order}, beyond {MAX_ORDER}; use fewer "
                "samples than features, fewer classes, or imu.self_influence(curvature='kfac')"
            )
        matrix = self._curvature.reshape(order, order).clone()
        matrix.diagonal().add_(decay.repeat(classes))
        if isinstance(self._outputs, Softmax):
            free = torch.diag((decay == 0).to(matrix)) * (len(self.delta) / classes)
            matrix.view(classes, width, classes, width).add_(free[:, None, :])
        factor, status = torch.linalg.cholesky_ex(matrix)
        if int(status):
            raise SingularMatrixError(
                f"the head's Hessian with weight decay is not positive definite (pivot "
                f"{int(status)} of {order}); raise weight_decay, or decay the bias too",
                pivot=int(status),
            )
        return factor
