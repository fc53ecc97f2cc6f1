"""Factors whose samples are the tokens of others, for what is asked of each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.mapped import MappedFactors
from imu_fast.factors.outputs import is_wide
from imu_fast.factors.source import Factors


def _tokens(chunk: GradientFactors) -> GradientFactors:
    """Every row a sample; its delta stays what it is of its sample's loss."""
    ends = torch.arange(len(chunk.delta) + 1)
    return replace(chunk, offsets=ends, losses=None, labels=None, loss=None, curvature=None)


class _WideTokenRows(MappedFactors):
    """Of more outputs than should be dealt with at once."""

    _source: Any

    @property
    def outputs_at_once(self) -> int:
        """The source's."""
        found: int = self._source.outputs_at_once
        return found

    def outputs(self, classes: slice) -> Factors:
        """The same tokens at some outputs."""
        return MappedFactors(self._source.outputs(classes), _tokens, of_rows=True)


def token_rows(source: Factors) -> Factors:
    """Each of the N tokens of ``source`` as a sample with the gradient ``delta_t (x) a~_t``."""
    kind = _WideTokenRows if is_wide(source) else MappedFactors
    return kind(source, _tokens, of_rows=True)
