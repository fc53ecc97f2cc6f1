"""Every form of data as batches that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from imu_fast.ambient import as_called
from imu_fast.errors import InputError, brief
from imu_fast.model.forward import LABEL_NAMES
from imu_fast.model.labels import is_integer
from imu_fast.model.nested import (
    as_tensor,
    batch_of_one,
    fields_of,
    is_array,
    is_number,
    mapped,
    taken,
)
from imu_fast.model.order import generators_kept
from imu_fast.model.parts import Data, Parts, device_of, pick
from imu_fast.model.split import Splitter

# Samples per batch where the data itself does not say.
BATCH = 256


class Reader:
    """Any form of data, read as :class:`Parts`.

    Args:
        loader: see :func:`imu_fast.model.batches.as_batches`.
        size: samples per batch, where the data itself does not say.

    Attributes:
        loader: the data, without a :class:`Data` around it.
        whole: all samples in one batch, split already; or None.
        is_dataset: whether ``loader`` is read by index, a sample at a time.

    Raises:
        InputError: this is no data.
    """

    def __init__(self, loader: Any, model: nn.Module, size: int = BATCH) -> None:
        self.data = loader if isinstance(loader, Data) else None
        self.loader = loader.loader if self.data is not None else loader
        self.split, self.size = Splitter(model, self.data), size
        columns = self.loader
        if type(columns) is TensorDataset:
            columns = columns.tensors
        elif _is_lists_of_columns(columns):
            columns = self.loader = list(zip(*columns, strict=True))
        _check_form(columns)
        self.is_dataset = _is_dataset(columns)
        if self.is_dataset:
            _check_length(self.loader)
        self.whole: Parts | None = None
        self.is_whole = _is_whole(columns)
        if self.is_whole:
            self._read_whole(columns)
        # What a list or a DataLoader gives exists side by side; another iterable may fill the
        # same memory again for its next batch.
        self._reuses = not isinstance(self.loader, list | tuple | DataLoader)

    def _read_whole(self, given: Any) -> None:
        columns = _tensors(given, self.split.floating)
        n = _length(columns)
        if n == 0:
            return
        # A part of it decides how it is read: the model may have to be asked.
        self.split(_rows(columns, range(min(n, self.size))))
        whole = self.split(columns)
        if whole.n != n:
            raise InputError(f"loader: {whole.n} labels for {n} samples; pass one per sample")
        self.whole = self._exact(whole, lambda dtype: _tensors(given, dtype))

    def __length_hint__(self) -> int:
        """How many batches there are; 0 where it would take reading them to know."""
        if self.whole is not None:
            return -(-self.whole.n // self.size)
        if self.is_dataset:
            return -(-len(self.loader) // self.size)
        try:
            if isinstance(self.loader, DataLoader):
                return len(self.loader) if self.loader.batch_sampler is not None else 0
            plain = isinstance(self.loader, list | tuple) and len(self.loader) > 0
            return len(self.loader) if plain and self._samples_in(self.loader[0]) is None else 0
        except (TypeError, NotImplementedError, InputError):  # which reading them says
            return 0

    def cut(self) -> Iterator[Parts]:
        """The whole in batches."""
        assert self.whole is not None
        for start in range(0, self.whole.n, self.size):
            yield self.whole.taken(range(start, min(start + self.size, self.whole.n)))

    def __iter__(self) -> Iterator[Parts]:
        if self.whole is not None:
            yield from self.cut()
        elif self.is_dataset:
            samples = map(self.sample, as_called(_by_index(self.loader)))
            yield from Parts.gathered(samples, self.size)
        elif not self.is_whole:
            with generators_kept(self.loader):
                yield from self._batches()

    def _batches(self) -> Iterator[Parts]:
        """Batches as they are; samples, where they come instead, are gathered."""
        samples: list[Parts] = []
        for item in self._items():
            several = self._samples_in(item)
            if several is not None:
                samples += several
                while len(samples) >= self.size:
                    *ready, rest = Parts.gathered(samples, self.size)
                    yield from ready or [rest]
                    samples = [rest] if ready else []
                continue
            yield from Parts.gathered(samples, self.size)
            samples = []
            parts = self.split(item)
            if parts.n:
                yield self._own(parts)
        yield from Parts.gathered(samples, self.size)

    def _items(self) -> Iterator[Any]:
        if isinstance(self.loader, Iterable) or not hasattr(self.loader, "__len__"):
            yield from as_called(self.loader)
        else:
            yield from as_called(_by_index(self.loader))

    def _own(self, parts: Parts) -> Parts:
        if not self._reuses:
            return parts
        return parts.mapped(lambda v: v.clone() if isinstance(v, Tensor) else v)

    def sample(self, item: Any) -> Parts:
        """One sample as a batch of one."""
        parts = self.split(batch_of_one(item, self.split.floating))
        return self._own(self._exact(parts, lambda dtype: batch_of_one(item, dtype)))

    def _exact(self, parts: Parts, batch: Callable[[torch.dtype | None], Any]) -> Parts:
        """With labels that are no class indices as they were given, and not in the model's dtype.

        Args:
            batch: what the parts were read of, its numbers in a dtype; None: their own.
        """
        if not parts.labels.is_floating_point():
            return parts
        there_is_no_other = device_of(self.split.model).type == "mps"
        dtype = torch.float32 if there_is_no_other else None
        return parts._replace(labels=self.split(batch(dtype)).labels)

    def _samples_in(self, item: Any) -> list[Parts] | None:
        """The samples that an item is or lists, each a batch of one; None: it is a batch."""
        if _is_sample(item, self.data):
            return [self.sample(item)]
        containers = list | tuple | Mapping
        if isinstance(item, list) and item and all(isinstance(i, containers) for i in item):
            if all(_is_sample(i, self.data) for i in item):
                return [self.sample(i) for i in item]
        return None

    def parts_of(self, item: Any) -> list[Parts]:
        """What a loader gave at once: one batch, or its samples."""
        samples = self._samples_in(item)
        return [self.split(item)] if samples is None else samples


def _by_index(dataset: Any) -> Iterator[Any]:
    return (dataset[i] for i in range(len(dataset)))


def _check_form(loader: Any) -> None:
    if isinstance(loader, str | bytes) or callable(getattr(loader, "read", None)):
        raise InputError(f"loader={loader!r} is no data; read the file into tensors first")
    if isinstance(loader, Tensor | np.ndarray):
        raise InputError("loader is one array without labels; pass (X, y)")
    if isinstance(loader, Mapping) and not _is_whole(loader):
        raise InputError(
            f"loader has keys {sorted(map(str, loader))} and no arrays under them; pass one of "
            "them, a DataLoader, batches, or tensors (X, y)"
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        hint = "; call it and pass what it returns" if callable(loader) else ""
        raise InputError(
            f"loader is a {type(loader).__name__}; pass a DataLoader, batches, or tensors "
            f"(X, y){hint}"
        )


def _check_length(dataset: Any) -> None:
    """Raise InputError for a dataset that does not say how many samples it has."""
    try:
        len(dataset)
    except (TypeError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"loader is a {type(dataset).__name__}, a dataset read by index, that does not say how "
            f"many samples it has ({brief(error, 100)}); give it a __len__, or pass [dataset[i] "
            "for i in range(n)] or a DataLoader with a sampler"
        ) from error


def _is_whole(loader: Any) -> bool:
    """Whether this is all samples in one, ``(X, y)`` or a dict of columns, not batches of them."""
    if isinstance(loader, Mapping):
        return any(is_array(value) for value in loader.values())
    if not isinstance(loader, list | tuple) or len(loader) < 2:
        return False
    if any(isinstance(item, Tensor | np.ndarray) and item.ndim > 0 for item in loader):
        return True
    return isinstance(loader, tuple) and all(is_array(item) for item in loader)


def _is_lists_of_columns(loader: Any) -> bool:
    """``([x0, x1, ...], [y0, y1, ...])``: a list of inputs and a list of single labels."""
    if not isinstance(loader, list | tuple) or not all(isinstance(c, list) for c in loader):
        return False
    single = [all(map(is_number, column)) for column in loader[1:]]
    tensors = loader and any(isinstance(v, Tensor | np.ndarray) and v.ndim for v in loader[0])
    return any(single) and bool(tensors) and len({len(column) for column in loader}) == 1


def _is_dataset(loader: Any) -> bool:
    """Whether this is a map-style dataset: torch's, or one of the ``datasets`` library."""
    if isinstance(loader, IterableDataset) or not hasattr(loader, "__getitem__"):
        return False
    if isinstance(loader, Dataset):
        return True
    return type(loader).__module__.split(".")[0] == "datasets" and hasattr(loader, "features")


def _is_sample(item: Any, data: Data | None) -> bool:
    """Whether this is one sample, known by its single label, and not a batch.

    Raises:
        InputError: it may be either.
    """
    if isinstance(item, Parts):
        return False
    if data is not None and data.labels is not None:
        return is_number(pick(item, data.labels, "labels"))
    if isinstance(item, list | tuple) and len(item) == 2 and fields_of(item) is None:
        return is_number(item[1]) or _has_single_label(item[1])
    if fields_of(item) is not None and _has_any_label(item):
        return _has_single_label(item) or _is_sequence((fields_of(item) or {}).get("input_ids"))
    if not isinstance(item, list | tuple) or len(item) < 2:
        return False
    single = any(is_number(part) for part in item[1:])
    if single and _rows_of_batch(item[0]) and any(map(_may_be_labels, item[1:])):
        raise InputError(
            "a batch holds single numbers beside arrays that may be labels: is it one "
            "sample or a batch? Say by imu_fast.Data(loader, inputs=..., labels=...)"
        )
    return single


def _has_any_label(item: Any) -> bool:
    return any(name in (fields_of(item) or {}) for name in LABEL_NAMES)


def _has_single_label(item: Any) -> bool:
    fields = fields_of(item) or {}
    return any(is_number(fields[name]) for name in LABEL_NAMES if name in fields)


def _is_sequence(ids: Any) -> bool:
    """Whether these are one sample's tokens: of a batch they have an axis of samples."""
    return is_array(ids) and as_tensor(ids).dim() == 1


def _rows_of_batch(value: Any) -> bool:
    """Whether this has an axis besides that of the samples, if it has samples."""
    return is_array(value) and as_tensor(value).dim() >= 2


def _may_be_labels(value: Any) -> bool:
    return is_array(value) and is_integer(as_tensor(value).dtype) and as_tensor(value).dim() > 0


def _tensors(whole: Any, floating: torch.dtype | None) -> Any:
    """Columns as tensors, all of one length.

    Raises:
        InputError: their lengths differ.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_nested:
            raise InputError(
                "loader holds a nested tensor, whose samples differ in shape; pass them padded, "
                "or a list of batches"
            )
        return as_tensor(value, floating) if is_array(value) else value

    if isinstance(whole, Mapping):
        made: Any = {key: mapped(value, leaf) for key, value in whole.items()}
    else:
        made = tuple(mapped(value, leaf) for value in whole)
    lengths = [len(t) for t in _columns(made)]
    if len(set(lengths)) > 1:
        raise InputError(f"loader: tensors have lengths {lengths}; pass one label per sample")
    return made


def _columns(whole: Any) -> list[Tensor]:
    values: Sequence[Any] = list(whole.values()) if isinstance(whole, dict) else whole
    return [value for value in values if isinstance(value, Tensor) and value.dim()]


def _length(whole: Any) -> int:
    return len(_columns(whole)[0])


def _rows(whole: Any, rows: range) -> Any:
    n = _length(whole)
    cut: Callable[[Any], Any] = lambda value: taken(value, rows, n)  # noqa: E731
    if isinstance(whole, dict):
        return {key: cut(value) for key, value in whole.items()}
    return tuple(cut(value) for value in whole)
