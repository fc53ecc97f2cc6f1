"""Factors whose samples are shared among the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch import Tensor

from imu_fast import distributed
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.outputs import at_outputs, is_wide
from imu_fast.factors.samples import Means
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import S


class ShardedFactors(Means):
    """One process's share of the samples; sums are over those of all processes.

    What is fitted on them is the same in every process; scores are of the samples that are here.
    Each process has to make the same calls in the same order: those that read sums wait for all.

    Args:
        local: the share of this process: ``factors.shard(rank, world)``, or captured from its part
            of the data.
        group: the processes; None: all.

    Raises:
        InputError: no process group, or shares of different layers.
    """

    def __init__(self, local: Factors, group: distributed.Group = None) -> None:
        distributed.check_group(group)
        self.local, self.group = local, group
        layer = (local.num_classes, local.feature_dim, local.has_bias, str(local.dtype))
        at_once = local.outputs_at_once if is_wide(local) else local.num_classes
        found = distributed.gather((local.n, local.num_tokens, layer, at_once), group)
        for rank, (_, _, other, _) in enumerate(found):
            if other != found[0][2]:
                raise InputError(
                    f"local: process {rank} has (C, d, bias, dtype) {other}, process 0 has "
                    f"{found[0][2]}; capture all from the same model and layer"
                )
        self._n = sum(n for n, _, _, _ in found)
        self._num_tokens = sum(tokens for _, tokens, _, _ in found)
        self._at_once = min(at_once for _, _, _, at_once in found)

    @property
    def n(self) -> int:
        """Samples of all processes."""
        return self._n

    @property
    def n_here(self) -> int:
        """Samples of this one."""
        return self.local.n

    @property
    def num_tokens(self) -> int:
        """Tokens of all processes."""
        return self._num_tokens

    @property
    def num_classes(self) -> int:
        """C."""
        return self.local.num_classes

    @property
    def feature_dim(self) -> int:
        """d."""
        return self.local.feature_dim

    @property
    def width(self) -> int:
        """D."""
        return self.local.width

    @property
    def has_bias(self) -> bool:
        """Whether D = d + 1."""
        return self.local.has_bias

    @property
    def name(self) -> str:
        """The layer's."""
        return self.local.name

    @property
    def device(self) -> torch.device:
        """Of this process's share."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the share."""
        return self.local.dtype

    @property
    def outputs_at_once(self) -> int:
        """The fewest that any process can deal with: all have to cut in the same places."""
        return self._at_once

    def outputs(self, classes: slice) -> ShardedFactors:
        """The same samples at some outputs alone."""
        some = copy(self)
        some.local = at_outputs(self.local, classes)
        return some

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """Of this process."""
        return self.local.chunks(max_tokens)

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """Over all processes; all of them get the same bits."""
        found = self.local.sums(statistic)
        for tensor in (found,) if isinstance(found, Tensor) else found:
            distributed.sum_(tensor, self.group)
        return found

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """Of the samples of this process."""
        return self.local.each(statistic)
