"""What an edit of a head is to disturb least: features, or the loss to second order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_positive
from imu_fast.solvers.cholesky.cholesky import damped_cholesky
from imu_fast.unlearning.summary.hessian import Damped, HeadHessian

# Elements of the [samples, C, D] right-hand sides that exist at once.
_ELEMENTS = 1 << 24


class Constraints(ABC):
    """The directions ``D_i (x) a~_i`` of some samples in a metric H.

    d, the D_i, are [k, C], float64: they change while the samples stay.
    """

    @abstractmethod
    def select(self, rows: Tensor) -> Constraints:
        """Those of some samples, in this order."""

    @abstractmethod
    def reach(self, d: Tensor) -> Tensor:
        """``Q_ii``: [k]."""

    @abstractmethod
    def gram(self, d: Tensor) -> Tensor:
        """``Q_ij = <D_i (x) a~_i, H^-1 (D_j (x) a~_j)>``: [k, k]."""

    @abstractmethod
    def combined(self, weights: Tensor, d: Tensor) -> Tensor:
        """``sum_i w_i H^-1 (D_i (x) a~_i)``: [C, D]; weights [k]."""


class Metric(ABC):
    """``<dT, H dT>`` of an edit dT [C, D]."""

    @abstractmethod
    def constraints(self, act: Tensor) -> Constraints:
        """Of samples with these features a~: [k, D], float64."""

    @abstractmethod
    def energy(self, step: Tensor) -> float:
        """``1/2 <dT, H dT>``: what an edit [C, D], float64, disturbs."""


class FeatureMetric(Metric):
    """``H = I (x) (S + eps tr(S)/D I)``: outputs of samples whose second moment is S, all alike.

    Args:
        moment: S [D, D].

    Raises:
        InputError: S is zero. SingularMatrixError: it is not positive definite, damped.
    """

    def __init__(self, moment: Tensor, eps: float) -> None:
        check_positive("eps", eps)
        moment = moment.double()
        if not bool(moment.trace() > 0):
            raise InputError(
                f"the second moment has trace {float(moment.trace()):g}; it must be positive (are "
                "all features zero?)"
            )
        self._factor = damped_cholesky(moment, eps * float(moment.trace()) / len(moment))
        self._upper = self._factor.factor.triu()

    def constraints(self, act: Tensor) -> Constraints:
        # Rows U^-T a~, so that their inner products are a~^T M a~.
        white = torch.linalg.solve_triangular(self._upper.T, act.T, upper=False).T
        return _OfFeatures(self, act, white)

    def energy(self, step: Tensor) -> float:
        return 0.5 * float((step @ self._upper.T).square().sum())

    def solve(self, columns: Tensor) -> Tensor:
        """``(S + ...)^-1`` of columns [D, k]."""
        return self._factor.solve(columns)


@dataclass(frozen=True)
class _OfFeatures(Constraints):
    metric: FeatureMetric
    act: Tensor
    white: Tensor

    def select(self, rows: Tensor) -> Constraints:
        return _OfFeatures(self.metric, self.act[rows], self.white[rows])

    def reach(self, d: Tensor) -> Tensor:
        return d.square().sum(dim=1) * self.white.square().sum(dim=1)

    @cached_property
    def inner(self) -> Tensor:
        """``a~_i^T M a~_j``, whatever the D_i: [k, k]."""
        return self.white @ self.white.T

    def gram(self, d: Tensor) -> Tensor:
        return (d @ d.T).mul_(self.inner)

    def combined(self, weights: Tensor, d: Tensor) -> Tensor:
        return (weights[:, None] * d).T @ self.metric.solve(self.act.T).T


class HessianMetric(Metric):
    """``H = GGN + damping I``: the loss of samples, to second order."""

    def __init__(self, damped: Damped) -> None:
        self.damped = damped

    @classmethod
    def of(cls, hessian: HeadHessian, eps: float, damping: float = 0.0) -> HessianMetric:
        """Of an undamped sum, with ``damping + eps`` times its mean eigenvalue.

        Raises:
            InputError: it is zero. SingularMatrixError: it is not positive definite, damped.
        """
        check_positive("eps", eps)
        mean = hessian.mean_eigenvalue
        if not mean > 0:
            raise InputError(
                f"the GGN has the mean eigenvalue {mean:g}; it must be positive (is every sample "
                "predicted with probability one?); use metric='features'"
            )
        return cls(hessian.damped(damping + eps * mean))

    def constraints(self, act: Tensor) -> Constraints:
        return _OfHessian(self.damped, act)

    def energy(self, step: Tensor) -> float:
        return 0.5 * float((step * self.damped.product(step)).sum())


@dataclass(frozen=True)
class _OfHessian(Constraints):
    damped: Damped
    act: Tensor

    def select(self, rows: Tensor) -> Constraints:
        return _OfHessian(self.damped, self.act[rows])

    def _pieces(self, d: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Directions [k, C D], some at a time, and these solved for."""
        step = max(1, _ELEMENTS // (d.shape[1] * self.act.shape[1]))
        for some, a in zip(d.split(step), self.act.split(step), strict=True):
            v = some[:, :, None] * a[:, None]
            yield v.flatten(1), self.damped.solve(v).flatten(1)

    def reach(self, d: Tensor) -> Tensor:
        return torch.cat([(v * x).sum(dim=1) for v, x in self._pieces(d)])

    def gram(self, d: Tensor) -> Tensor:
        every = (d[:, :, None] * self.act[:, None]).flatten(1)
        out = torch.cat([x @ every.T for _, x in self._pieces(d)])
        return (out + out.T).div_(2)

    def combined(self, weights: Tensor, d: Tensor) -> Tensor:
        return self.damped.solve((weights[:, None] * d).T @ self.act)
