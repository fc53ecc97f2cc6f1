"""What forms of gradient factors have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.errors import InputError, check_count
from imu_fast.factors.operands import check_result
from imu_fast.factors.outputs import rows_of_outputs
from imu_fast.factors.protocol import C, Source, mean_of
from imu_fast.factors.squares import diagonal_of
from imu_fast.factors.sums import S, joined, summed
from imu_fast.ops.mean_gradient import mean_gradient
from imu_fast.ops.tokens import is_flat


def _gradient(c: Any) -> Tensor:
    """Of a chunk, unchecked: what is not finite shows in the mean of all, which is checked once."""
    return mean_gradient(c.delta, c.act, c.offsets, c.has_bias)


def unchecked_mean_gradient(source: Source[Any]) -> Tensor:
    """``gbar``, finite or not."""
    return rows_of_outputs(source, lambda part: mean_of(part, _gradient))


class Means:
    """Means over all samples, of some outputs at a time where all would be too many."""

    def mean_gradient(self: Source[Any]) -> Tensor:
        """``gbar = 1/n sum_i g_i``: [C, D], in the factors' dtype."""
        return check_result("the mean gradient", unchecked_mean_gradient(self), self)

    def fisher_diagonal(self: Source[Any]) -> Tensor:
        """``1/n sum_i g_i * g_i``, the empirical Fisher's diagonal: [C, D]."""
        found = rows_of_outputs(self, lambda part: mean_of(part, diagonal_of))
        return check_result("the Fisher's diagonal", found, self)


class Chunks(ABC, Generic[C]):
    """Sums over what :meth:`chunks` gives."""

    @abstractmethod
    def chunks(self, max_tokens: int | None = None) -> Iterator[C]: ...

    def sums(self, statistic: Callable[[C], S]) -> S:
        """``statistic`` of all samples, see :class:`imu_fast.factors.protocol.Source`."""
        return summed(map(statistic, self.chunks()))

    def each(self, statistic: Callable[[C], Tensor]) -> Tensor:
        """``statistic`` of every sample, see :class:`imu_fast.factors.protocol.Source`."""
        return joined(map(statistic, self.chunks()))


class Samples(Means, Chunks[C]):
    """Samples that are all here, whose packed tokens ``offsets`` [n+1] (int64, CPU) tells apart."""

    offsets: Tensor

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.offsets.shape[0] - 1

    @property
    def n_here(self) -> int:
        """n: none of them is elsewhere."""
        return self.n

    @property
    def width(self: Source[Any]) -> int:
        """D = d + 1 with a bias, d without."""
        return self.feature_dim + self.has_bias

    @property
    def is_flat(self) -> bool:
        """True if every sample has exactly one token."""
        return is_flat(self.offsets)

    @property
    def empty_samples(self) -> Tensor:
        """Indices of the samples without a valid token: their gradient and score are zero."""
        return torch.nonzero(self.offsets.diff() == 0).flatten()

    @abstractmethod
    def samples(self, first: int, last: int) -> Self:
        """Samples first:last as views."""

    def shard(self, rank: int, world: int) -> Self:
        """The consecutive share of samples of one of ``world`` processes, as views."""
        check_count("world", world)
        if not 0 <= rank < world or self.n < world:
            raise InputError(f"rank={rank} of world={world} cannot share {self.n} samples")
        return self.samples(self.n * rank // world, self.n * (rank + 1) // world)


class Stored(Samples[C]):
    """Samples whose signal ``delta`` [N, C] is at hand."""

    delta: Tensor

    @property
    def num_tokens(self) -> int:
        """N, packed tokens: positions that have a gradient."""
        return self.delta.shape[0]

    @property
    def num_classes(self) -> int:
        """C, the width of the layer's output."""
        return self.delta.shape[1]

    @property
    def device(self) -> torch.device:
        """Where delta and inputs are."""
        return self.delta.device

    @property
    def dtype(self) -> torch.dtype:
        """Of delta, and of statistics; inputs of half precision are narrower."""
        return self.delta.dtype
