"""Factors whose chunks are those of others, changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import S

Change = Callable[[GradientFactors], GradientFactors]


def changed(source: Factors, change: Change) -> Factors:
    """Factors with ``change`` of every chunk; in memory, made once."""
    return change(source) if isinstance(source, GradientFactors) else MappedFactors(source, change)


class MappedFactors:
    """``change`` of every chunk of ``source``; of the same layer, and as many samples.

    Args:
        of_rows: each token becomes a sample, of a source that is here as a whole.
    """

    def __init__(self, source: Factors, change: Change, of_rows: bool = False) -> None:
        self._source, self._change = source, change
        self.num_tokens = source.num_tokens
        self.n = source.num_tokens if of_rows else source.n
        self.n_here = source.num_tokens if of_rows else source.n_here
        self.num_classes, self.feature_dim = source.num_classes, source.feature_dim
        self.width, self.has_bias, self.name = source.width, source.has_bias, source.name
        self.device, self.dtype = source.device, source.dtype

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """The source's, changed."""
        return map(self._change, self._source.chunks(max_tokens))

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """See :class:`imu_fast.factors.source.Factors`."""
        return self._source.sums(lambda chunk: statistic(self._change(chunk)))

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """See :class:`imu_fast.factors.source.Factors`."""
        return self._source.each(lambda chunk: statistic(self._change(chunk)))
