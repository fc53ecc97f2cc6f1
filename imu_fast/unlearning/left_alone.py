"""Whether a forget set is predicted better than unseen data, and a run that changes nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imu_fast.model.outputs import Measurement, measured
from imu_fast.options import options
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import naming
from imu_fast.unlearning.trajectory import Trajectory


def no_better(right: int, n: int, unseen: float, count: int | None) -> float:
    """The p-value of "the forget set is predicted no better than unseen data", one-sided.

    The probability of ``right`` of n or more. With ``count``, the samples that ``unseen`` is the
    accuracy on, Fisher's exact test: hypergeometric, given how many of both are right. Without,
    binomial, as if ``unseen`` were known.
    """
    k = torch.arange(right, n + 1, dtype=torch.float64)
    if count is None:
        if not 0 < unseen < 1:
            return float(unseen == 1 or right == 0)
        logs = _log_binomial(n, k) + k * math.log(unseen) + (n - k) * math.log1p(-unseen)
    else:
        total = right + round(unseen * count)
        k = k[k <= total]
        logs = _log_binomial(n, k) + _log_binomial(count, total - k)
        logs = logs - _log_binomial(n + count, torch.tensor(float(total), dtype=torch.float64))
    return min(1.0, float(torch.logsumexp(logs, 0).exp()))


def _log_binomial(n: int, k: Tensor) -> Tensor:
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


class _AsItIs:
    """The model, measured by itself."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def measure(self, name: str) -> Measurement:
        job = self._job
        with naming(name):
            return measured(job.model, job.sets[name], job.reading, "unlearn()")


@options
class LeftAlone(Method):
    """No step: what ``auto`` does where there is nothing to forget that the data show."""

    name = "left_alone"

    def run(self, job: Job) -> UnlearnResult:
        trajectory = Trajectory(_AsItIs(job), job.watch, job.callback)
        trajectory.record(0, 0)
        none = torch.arange(0)
        return UnlearnResult(
            job.model, None, none, torch.ones(0), trajectory.records, stopped_by="left_alone"
        )
