"""The share of a process that has no samples: it adds nothing to sums, and knows their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import S


def one_sample(source: Factors) -> GradientFactors:
    """A sample of these factors with its gradient and inputs zero: what kind of factors they are.

    Small, of its own memory and on the CPU, so that it can be sent to another process.
    """
    chunk = next(iter(source.chunks(1)))
    whole = int((chunk.offsets.diff() > 0).int().argmax())
    one = chunk.samples(whole, whole + 1)
    own = one._changed(lambda x: x.clone())
    own |= {"delta": torch.zeros_like(one.delta), "act": torch.zeros_like(one.act)}
    losses = None if one.losses is None else one.losses.clone()
    return replace(one, **own, offsets=one.offsets.clone(), losses=losses).to("cpu")


class NoneHere:
    """No samples, of the same layer as others.

    Args:
        like: one of these, see :func:`one_sample`: statistics of it say what shapes to return.
    """

    def __init__(self, like: GradientFactors) -> None:
        self._like = like
        self.n = self.n_here = self.num_tokens = 0
        self.num_classes, self.feature_dim = like.num_classes, like.feature_dim
        self.width, self.has_bias, self.name = like.width, like.has_bias, like.name
        self.device, self.dtype = like.device, like.dtype

    @property
    def losses(self) -> Tensor | None:
        """[0], where the others have theirs."""
        return None if self._like.losses is None else self._like.losses[:0]

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """A sample that is none of this set, for what asks a chunk of which kind it is."""
        yield self._like

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """Zeros."""
        found = statistic(self._like)
        if isinstance(found, Tensor):
            return found.zero_()
        for tensor in found:
            tensor.zero_()
        return found

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """No rows."""
        return statistic(self._like)[:0]
