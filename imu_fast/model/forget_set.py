"""The forget samples by index, in one fixed order."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from imu_fast.ambient import as_called, default_device_back, random_state_kept
from imu_fast.errors import InputError
from imu_fast.model.guard import preserved
from imu_fast.model.order import index_batches, say_remarks, warn_of_order
from imu_fast.model.parts import Parts
from imu_fast.model.reader import Reader

Piece = tuple[Parts, list[int]]


def empty_message(loader: Any, name: str = "loader") -> str:
    """What to say of data that gave no sample."""
    loader = getattr(loader, "loader", loader)
    if isinstance(loader, Iterator):
        return (
            f"{name} is empty: a {type(loader).__name__} can be read once, and this one may have "
            "been; pass a list or a DataLoader"
        )
    if getattr(getattr(loader, "batch_sampler", None), "drop_last", False) is True:
        return f"{name} is empty: drop_last=True leaves out its only batch; use drop_last=False"
    return f"{name} is empty; pass at least one sample"


class ForgetSet:
    """The forget samples by index, in the order in which the loader gives them.

    Sample i is the i-th of one pass, repetitions included; the sampler is iterated once, here, and
    its order holds from then on. Iterating gives the loader's own batches.

    Args:
        loader: any form of data. A map-style dataset, alone or in a DataLoader, is read by index,
            with the loader's ``collate_fn``; everything else is read once and kept: forget sets
            are small. A dataset that augments at random gives another sample at each reading.
        batch_size: samples per batch where the data itself does not say.
        model: for its signature, which says what is an input and what a label.
        dataset_order: instead of the loader's order that of its dataset, which a shuffling loader
            does not change; for where nothing is returned per sample.

    Attributes:
        n: samples.
        dataset_indices: [n], the place of each sample in the loader's dataset (a Subset's own
            places) or in the tensors; None where samples have none.

    Raises:
        InputError: the loader is empty, or its batches can be read in two ways.
    """

    def __init__(
        self, loader: Any, batch_size: int, model: nn.Module, *, dataset_order: bool = False
    ) -> None:
        self.batch_size = batch_size
        reader = self._reader = Reader(loader, model, batch_size)
        inner = reader.loader
        say_remarks(inner)
        if not dataset_order:
            warn_of_order(inner)
        self._kept: list[Parts] = []
        self._indices: list[Any] = []
        batches = index_batches(inner)
        if reader.whole is not None:
            self._kept = [reader.whole]
            batches = _runs(reader.whole.n, batch_size)
        elif reader.is_dataset:
            batches = _runs(len(inner), batch_size)
        elif batches is None:
            with preserved(model):  # the loader runs the user's code
                self._kept = list(reader)
        if batches is not None:
            self._indices = [index for batch in batches for index in batch]
            self._sizes = [len(batch) for batch in batches]
        else:
            self._sizes = [part.n for part in self._kept]
        self.n = sum(self._sizes)
        if self.n == 0:
            raise InputError(empty_message(inner, "forget_loader"))
        # Of their kinds, of which there are few, and of indices many.
        kinds = set(map(type, self._indices))
        known = bool(kinds) and all(issubclass(kind, int) for kind in kinds)
        if known and dataset_order:
            self._indices.sort()
        self.dataset_indices: list[int] | None = list(self._indices) if known else None
        # The first row of each kept batch.
        self._starts = [0, *itertools.accumulate(part.n for part in self._kept)][:-1]

    @property
    def reads_anew(self) -> bool:
        """Whether samples are not kept, but read by index each time."""
        return not self._kept

    def pieces(self, rows: Sequence[int]) -> list[Piece]:
        """The samples of these indices, in as few batches as their shapes allow.

        Returns:
            ``(batch, positions)`` pairs: sample j of a batch is ``rows[positions[j]]``. One pair,
            but where samples have shapes of their own.
        """
        rows = list(rows)
        if len(self._kept) == 1:
            return [(self._kept[0].taken(rows), list(range(len(rows))))]
        if self._kept:
            by_batch: dict[int, list[int]] = {}
            for place, row in enumerate(rows):
                by_batch.setdefault(bisect_right(self._starts, row) - 1, []).append(place)
            return _grouped(
                (self._kept[b].taken([rows[at] - self._starts[b] for at in places]), places)
                for b, places in by_batch.items()
            )
        inner = self._reader.loader
        indices = [self._indices[row] for row in rows]
        if isinstance(inner, DataLoader):
            with default_device_back():
                item = inner.collate_fn(_fetched(inner.dataset, indices))
            parts = self._reader.parts_of(item)
        else:
            items = (inner[index] for index in indices)
            parts = list(map(self._reader.sample, as_called(items)))
        return _grouped(_placed(parts, len(rows)))

    def get(self, rows: Sequence[int]) -> Parts:
        """One batch with the samples of these indices, in this order.

        Raises:
            InputError: they have different shapes; :meth:`pieces` gives them.
        """
        pieces = self.pieces(rows)
        if len(pieces) > 1:
            raise InputError(
                f"the forget samples come in {len(pieces)} different shapes, which cannot be one "
                "batch; pad them alike, or pass a DataLoader whose collate_fn does"
            )
        parts, places = pieces[0]
        if places == list(range(len(places))):
            return parts
        return parts.taken(sorted(range(len(places)), key=places.__getitem__))

    def subset(self, rows: Sequence[int]) -> Iterable[Parts]:
        """The samples of these indices in this order, in as many batches as that takes."""
        samples: list[Parts] = [self.get([row]) for row in rows]
        return list(Parts.gathered(samples, self.batch_size))

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Parts]:
        if self._reader.whole is not None:
            yield from self._reader.cut()
        elif self._kept:
            yield from self._kept
        elif getattr(self._reader.loader, "num_workers", 0):
            yield from self._with_workers()
        else:
            start = 0
            for size in self._sizes:
                for parts, _ in _in_order(self.pieces(range(start, start + size))):
                    yield parts
                start += size

    def _with_workers(self) -> Iterator[Parts]:
        inner, batches, start = self._reader.loader, [], 0
        for size in self._sizes:
            batches.append(self._indices[start : start + size])
            start += size
        same: DataLoader[Any] = DataLoader(
            inner.dataset,
            batch_sampler=batches,
            collate_fn=inner.collate_fn,
            num_workers=inner.num_workers,
            worker_init_fn=inner.worker_init_fn,
            multiprocessing_context=inner.multiprocessing_context,
            timeout=inner.timeout,
            prefetch_factor=inner.prefetch_factor,
        )
        with random_state_kept():
            for item, size in zip(as_called(same), self._sizes, strict=True):
                placed = _placed(self._reader.parts_of(item), size)
                for parts, _ in _in_order(_grouped(placed)):
                    yield parts


def _runs(n: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def _fetched(dataset: Any, indices: list[Any]) -> list[Any]:
    """Samples as torch's own loader reads them."""
    many: Callable[[list[Any]], list[Any]] | None = getattr(dataset, "__getitems__", None)
    return many(indices) if many else [dataset[index] for index in indices]


def _placed(parts: list[Parts], n: int) -> list[Piece]:
    """Consecutive batches, and which of n samples each holds."""
    found, start = [], 0
    for part in parts:
        found.append((part, list(range(start, start + part.n))))
        start += part.n
    if start != n:
        raise InputError(
            f"the loader's collate_fn made {start} labels of {n} samples; labels need one row per "
            "sample"
        )
    return found


def _grouped(found: Iterable[Piece]) -> list[Piece]:
    """Batches of one shape put together, and where each of their samples belongs."""
    groups: list[tuple[list[Parts], list[int]]] = []
    for parts, places in found:
        for members, at in groups:
            if members[0].alike(parts):
                members.append(parts)
                at += places
                break
        else:
            groups.append(([parts], list(places)))
    return [(Parts.joined(members), at) for members, at in groups]


def _in_order(pieces: list[Piece]) -> list[Piece]:
    """Pieces cut where their samples do not follow one another, and sorted."""
    runs: list[Piece] = []
    for parts, places in pieces:
        start = 0
        for end in range(1, len(places) + 1):
            if end == len(places) or places[end] != places[end - 1] + 1:
                runs.append((parts.taken(range(start, end)), places[start:end]))
                start = end
    return sorted(runs, key=lambda run: run[1][0])
