"""Forms of data: whatever people have, read in one way by every door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any

from torch import nn

from imu_fast.errors import InputError
from imu_fast.model.forget_set import ForgetSet, empty_message
from imu_fast.model.order import say_remarks, warn_of_order
from imu_fast.model.parts import Data, Parts, device_of, to_device
from imu_fast.model.reader import Reader
from imu_fast.model.split import Splitter

__all__ = [
    "Data",
    "ForgetSet",
    "Parts",
    "as_batches",
    "device_of",
    "empty_message",
    "rereadable",
    "split_batch",
    "to_device",
    "warn_of_order",
]


class Reread:
    """Data that may be read any number of times; made by :func:`rereadable`."""

    def __init__(self, read: Callable[[], Iterator[Parts]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Parts]:
        return self._read()


class _Batches(Iterator[Parts]):
    """Those of a reader, which says about how many come."""

    def __init__(self, reader: Reader) -> None:
        self._hint, self._batches = length_hint(reader), iter(reader)

    def __length_hint__(self) -> int:
        return self._hint

    def __next__(self) -> Parts:
        return next(self._batches)


def as_batches(loader: Any, model: nn.Module) -> Iterator[Parts]:
    """All samples of any form of data, in the order in which it gives them.

    Args:
        loader: a DataLoader; an iterable of batches ``(inputs, labels)``, dicts with labels,
            namedtuples or dataclasses, however nested; samples of these forms; a map-style or
            iterable dataset; tensors or numpy arrays ``(X, y)`` or ``(X, Z, y)`` or a dict of
            them; a :class:`Data` around any; a :class:`ForgetSet`.
        model: for its signature, which says how many inputs there are.

    Returns:
        Batches that have at least one sample. What the loader leaves out (``drop_last``, other
        processes' shares) is said through the log. Its ``length_hint`` is how many come, if known.

    Raises:
        InputError: this is no data, or can be read in two ways.
    """
    if isinstance(loader, ForgetSet | Reread):
        return iter(loader)
    reader = Reader(loader, model)
    say_remarks(reader.loader)
    return _Batches(reader)


def rereadable(loader: Any, model: nn.Module) -> Iterable[Parts]:
    """Any form of data as something that may be iterated again and again, by :func:`as_batches`.

    A generator, or another iterator, is read now and kept; everything else is read anew each time.
    What the loader leaves out is said once.

    Raises:
        InputError: as :func:`as_batches`; an iterator that has nothing (more) to give.
    """
    if isinstance(loader, ForgetSet | Reread):
        return loader
    reader = Reader(loader, model)
    say_remarks(reader.loader)
    if not isinstance(reader.loader, Iterator):
        return Reread(lambda: iter(reader))
    kept = list(reader)
    if not kept:
        raise InputError(empty_message(loader))
    return Reread(lambda: iter(kept))


def split_batch(batch: Any, model: nn.Module | None = None) -> Parts:
    """``(positional inputs, keyword inputs, labels)`` of one batch.

    Args:
        model: whose inputs they are; needed unless :func:`as_batches` or a :class:`ForgetSet`
            gave the batch, which have split it already.

    Raises:
        InputError: the batch holds no labels, or can be read in two ways.
    """
    if isinstance(batch, Parts):
        return batch
    if model is None:
        raise InputError(
            "model=None: which parts of a batch are inputs depends on the model; pass it, or "
            "read the data by as_batches(loader, model)"
        )
    parts = Splitter(model)(batch)
    _ = parts.n  # one number is no labels
    return parts
