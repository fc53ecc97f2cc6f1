"""Factors whose samples are the tokens of others, for what is asked of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.outputs import is_wide
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import S


def _tokens(chunk: GradientFactors) -> GradientFactors:
    """Every row a sample; its delta stays what it is of its sample's loss."""
    ends = torch.arange(len(chunk.delta) + 1)
    return replace(chunk, offsets=ends, losses=None, labels=None, loss=None, curvature=None)


class TokenRows:
    """Each of the N tokens of ``source`` as a sample with the gradient ``delta_t (x) a~_t``."""

    def __init__(self, source: Factors) -> None:
        self._source = source
        self.n = self.n_here = self.num_tokens = source.num_tokens
        self.num_classes, self.feature_dim = source.num_classes, source.feature_dim
        self.width, self.has_bias, self.name = source.width, source.has_bias, source.name
        self.device, self.dtype = source.device, source.dtype

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """The source's, row by row."""
        return map(_tokens, self._source.chunks(max_tokens))

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """See :class:`imu_fast.factors.source.Factors`."""
        return self._source.sums(lambda chunk: statistic(_tokens(chunk)))

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """See :class:`imu_fast.factors.source.Factors`."""
        return self._source.each(lambda chunk: statistic(_tokens(chunk)))


class _WideTokenRows(TokenRows):
    """Of more outputs than should be dealt with at once."""

    _source: Any

    @property
    def outputs_at_once(self) -> int:
        """The source's."""
        found: int = self._source.outputs_at_once
        return found

    def outputs(self, classes: slice) -> Factors:
        """The same tokens at some outputs."""
        return TokenRows(self._source.outputs(classes))


def token_rows(source: Factors) -> Factors:
    """The factors of a source's tokens, all of which are here."""
    wide = is_wide(source)
    return _WideTokenRows(source) if wide else TokenRows(source)
