"""What every form of gradient factors offers, and means of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from imu_fast.factors.sums import S


class Chunk(Protocol):
    """Samples with their signal at hand: a GradientFactors."""

    @property
    def n(self) -> int: ...
    @property
    def delta(self) -> Tensor: ...
    def with_delta(self, delta: Tensor) -> Any: ...
    def mean_gradient(self) -> Tensor: ...
    def fisher_diagonal(self) -> Tensor: ...


C = TypeVar("C", bound=Chunk)
C_co = TypeVar("C_co", bound=Chunk, covariant=True)


class Source(Protocol[C_co]):
    """The gradients ``g_i = sum_t delta[i,t] (x) [act[i,t], 1]`` of n samples at one layer.

    Attributes:
        n: samples, N = num_tokens: packed tokens, C = num_classes: the layer's outputs, d =
            feature_dim: its inputs, D = width: d + 1 with a bias, else d.
        n_here: samples that this process holds: n, unless factors are shared among processes.
        name: the layer's.
        device, dtype: of what chunks hold.
    """

    @property
    def n(self) -> int: ...
    @property
    def n_here(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def feature_dim(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def has_bias(self) -> bool: ...
    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def chunks(self, max_tokens: int | None = None) -> Iterator[C_co]:
        """The samples of this process in order, cut between samples.

        Args:
            max_tokens: of a chunk, which may be one larger sample; None: as many as suit.
        """
        ...

    def sums(self, statistic: Callable[[C_co], S]) -> S:
        """The sum over all chunks, and processes, in a fixed order.

        Args:
            statistic: of one chunk: a tensor or a tuple of them, new ones: they are added to.
        """
        ...

    def each(self, statistic: Callable[[C_co], Tensor]) -> Tensor:
        """The results of all chunks of this process, one after the other: [n_here, ...].

        Args:
            statistic: of one chunk of k samples: [k, ...].
        """
        ...


def is_shared(value: Any) -> bool:
    """Whether these are factors whose samples several processes share."""
    return hasattr(type(value), "gathered")


def mean_of(source: Source[C], statistic: Callable[[C], Tensor]) -> Tensor:
    """The mean over all samples, from the mean over each chunk's.

    Args:
        statistic: of one chunk; a new tensor.
    """

    def share(chunk: C) -> Tensor:
        mean = statistic(chunk)
        return mean if chunk.n == source.n else mean.mul_(chunk.n / source.n)

    return source.sums(share)
