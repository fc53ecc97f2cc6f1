"""What curvatures and scores ask of gradient factors, wherever and however these are kept.

Every statistic but the Gram matrix is a sum over samples, so one verb, ``sums``, serves factors in
memory, read from a file, made anew from a loader at each pass, and shared among processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imu_fast.factors.gradient_factors import GradientFactors

S = TypeVar("S", Tensor, tuple[Tensor, ...])
T = TypeVar("T", covariant=True)


class Factors(Protocol):
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

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """The samples of this process in order, cut between samples.

        Args:
            max_tokens: of a chunk, which may be one larger sample; None: as many as suit.
        """
        ...

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """The sum over all chunks, and processes, in a fixed order.

        Args:
            statistic: of one chunk: a tensor or a tuple of them, new ones: they are added to.
        """
        ...

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """The results of all chunks of this process, one after the other: [n_here, ...].

        Args:
            statistic: of one chunk of k samples: [k, ...].
        """
        ...


def is_factors(value: Any) -> bool:
    """Whether this is one layer's factors, in whatever form."""
    return all(callable(getattr(type(value), name, None)) for name in ("chunks", "sums", "each"))


def summed(parts: Iterable[S]) -> S:
    """The sum, in this order, in the memory of the first."""
    total: Any = None
    for part in parts:
        if total is None:
            total = part
            continue
        pairs = [(total, part)] if isinstance(part, Tensor) else zip(total, part, strict=True)
        for one, more in pairs:
            one.add_(more)
    return total


def joined(parts: Iterable[Tensor]) -> Tensor:
    """All rows; of a single part itself."""
    first, *rest = parts
    return torch.cat([first, *rest]) if rest else first


def mean_of(source: Factors, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
    """The mean over all samples, from the mean over each chunk's.

    Args:
        statistic: of one chunk; a new tensor.
    """

    def share(chunk: GradientFactors) -> Tensor:
        mean = statistic(chunk)
        return mean if chunk.n == source.n else mean.mul_(chunk.n / source.n)

    return source.sums(share)


class Remembered(Generic[T]):
    """What is made of a chunk, remembered for the last one: in memory there is no other."""

    def __init__(self, make: Callable[[GradientFactors], T]) -> None:
        self._make = make
        self._last: tuple[GradientFactors, T] | None = None

    def __call__(self, chunk: GradientFactors) -> T:
        if self._last is None or self._last[0] is not chunk:
            self._last = None  # two at once would need the memory of two
            self._last = chunk, self._make(chunk)
        return self._last[1]
