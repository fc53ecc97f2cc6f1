"""Some outputs of a layer at a time, for what separates over them.

The rows of ``g_i [C, D]`` are those of the layer's outputs, so the same samples at some outputs
alone are factors too: of a layer with fewer classes. A diagonal curvature couples no two rows, and
may be fitted, solved with and scored so many of them at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeGuard

from torch import Tensor

from imu_fast import distributed
from imu_fast.factors.protocol import C, Source, is_shared
from imu_fast.factors.sums import S, summed


class Wide(Protocol):
    """Factors of more outputs than should be dealt with at once."""

    @property
    def outputs_at_once(self) -> int: ...

    def outputs(self, classes: slice) -> Any:
        """Factors of ``num_classes = stop - start`` outputs."""
        ...


def is_wide(source: Source[Any]) -> TypeGuard[Wide]:
    """Asked several times per layer and batch, which a protocol's isinstance is slow for."""
    return _has_outputs(type(source))


@functools.cache
def _has_outputs(kind: type) -> bool:
    return hasattr(kind, "outputs_at_once") and hasattr(kind, "outputs")


class SomeOutputs(Generic[C]):
    """Some outputs of factors whose signal is at hand.

    Args:
        classes: ``start:stop``.
    """

    def __init__(self, source: Source[C], classes: slice) -> None:
        self._source, self._classes = source, classes
        self.num_classes = classes.stop - classes.start
        self.n, self.n_here, self.num_tokens = source.n, source.n_here, source.num_tokens
        self.feature_dim, self.width = source.feature_dim, source.width
        self.has_bias, self.name = source.has_bias, source.name
        self.device, self.dtype = source.device, source.dtype

    def _of(self, chunk: C) -> C:
        found: C = chunk.with_delta(chunk.delta[:, self._classes])
        return found

    def chunks(self, max_tokens: int | None = None) -> Iterator[C]:
        """The source's, at these outputs."""
        return map(self._of, self._source.chunks(max_tokens))

    def sums(self, statistic: Callable[[C], S]) -> S:
        """See :class:`imu_fast.factors.protocol.Source`."""
        return self._source.sums(lambda chunk: statistic(self._of(chunk)))

    def each(self, statistic: Callable[[C], Tensor]) -> Tensor:
        """See :class:`imu_fast.factors.protocol.Source`."""
        return self._source.each(lambda chunk: statistic(self._of(chunk)))


def cuts_of_outputs(*sources: Any) -> list[slice]:
    """Which outputs to deal with at a time: all, unless a source says fewer."""
    classes = sources[0].num_classes
    if len(sources) == 1 and not is_wide(sources[0]):
        return [slice(0, classes)]
    step = min(s.outputs_at_once if is_wide(s) else classes for s in sources)
    # Of other factors each process may have its own, and all have to cut in the same places.
    for source in sources if len(sources) > 1 else ():
        if is_shared(source):
            step = min(distributed.gather(step, source.group))
            break
    return [slice(c, min(c + step, classes)) for c in range(0, classes, step)]


def at_outputs(source: Source[C], classes: slice) -> Source[C]:
    """The same samples at these outputs alone; of all outputs, the source itself."""
    if classes == slice(0, source.num_classes):
        return source
    if is_wide(source):
        found: Source[C] = source.outputs(classes)
        return found
    return SomeOutputs(source, classes)


def rows_of_outputs(source: Source[C], rows: Callable[[Source[C]], Tensor]) -> Tensor:
    """A matrix whose rows are those of the outputs: [C, ...].

    Args:
        rows: of some outputs' factors, [classes, ...].
    """
    pieces = cuts_of_outputs(source)
    if len(pieces) == 1:
        return rows(source)
    out: Tensor | None = None
    for classes in pieces:
        part = rows(at_outputs(source, classes))
        if out is None:
            out = part.new_empty(source.num_classes, *part.shape[1:])
        out[classes] = part
    assert out is not None
    return out


def sum_of_outputs(source: Source[C], term: Callable[[Source[C], slice], Tensor]) -> Tensor:
    """A sum over outputs: of each sample's, [n_here, ...].

    Args:
        term: of some outputs' factors, and which they are; a new tensor.
    """
    return summed(term(at_outputs(source, c), c) for c in cuts_of_outputs(source))


def for_inputs(source: Source[C]) -> Source[C]:
    """Factors with the same tokens and inputs, for what does not read the signal."""
    wide = is_wide(source)
    return at_outputs(source, slice(0, 1)) if wide else source
