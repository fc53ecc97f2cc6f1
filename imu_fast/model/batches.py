"""Forms of data: loaders, tensors and batches, read in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError


def indices_of(loader: Any) -> Sequence[int] | None:
    """Which samples of its dataset a DataLoader draws, ascending; None: not to be read by index."""
    data = torch.utils.data
    if not isinstance(loader, data.DataLoader) or isinstance(loader.dataset, data.IterableDataset):
        return None
    if loader.batch_sampler is None:  # batch_size=None: the dataset's items are batches
        return None
    if loader.batch_size is None:  # the user's own batch_sampler
        return sorted({i for batch in loader.batch_sampler for i in batch})
    everything = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(loader.sampler, data.SequentialSampler):
        return everything
    drawn = sorted(set(loader.sampler))
    return everything if len(drawn) == len(everything) else drawn


class ForgetSet:
    """The forget samples by index, in one fixed order whatever the loader's shuffling.

    Args:
        loader: a DataLoader over a map-style dataset (read by index with its ``collate_fn``; only
            the samples that its sampler draws, in ascending order), a tuple of tensors, or any
            iterable of batches (kept in memory: forget sets are small).
        batch_size: samples per batch of :meth:`batches`.

    Raises:
        InputError: the loader is empty.
    """

    def __init__(self, loader: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self._get: Callable[[list[int]], Any]
        drawn = indices_of(loader)
        if drawn is not None:
            dataset = loader.dataset
            self.n = len(drawn)
            self._get = lambda rows: loader.collate_fn([dataset[drawn[i]] for i in rows])
        else:
            batches = list(as_batches(loader))
            if batches and isinstance(batches[0], Mapping):
                columns = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
                self.n = len(next(iter(columns.values())))
                self._get = lambda rows: {k: v[rows] for k, v in columns.items()}
            else:
                parts = [torch.cat(part) for part in zip(*batches, strict=True)]
                self.n = len(parts[0]) if parts else 0
                self._get = lambda rows: tuple(part[rows] for part in parts)
        if self.n == 0:
            raise InputError("forget_loader is empty; pass at least one forget sample")

    def get(self, rows: Sequence[int]) -> Any:
        """One batch with the samples of these indices."""
        return self._get(list(rows))

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.n, self.batch_size):
            yield self.get(range(start, min(start + self.batch_size, self.n)))


_TENSOR_BATCH = 256


def as_batches(loader: Any) -> Iterable[Any]:
    """A loader, or a tuple of tensors cut into batches, as something to iterate."""
    if isinstance(loader, tuple) and loader and all(isinstance(t, Tensor) for t in loader):
        if len({len(t) for t in loader}) > 1:
            raise InputError(f"loader: tensors have lengths {[len(t) for t in loader]}")
        return (
            list(zip(*(t.split(_TENSOR_BATCH) for t in loader), strict=True))
            if len(loader[0])
            else []
        )
    if not isinstance(loader, Iterable):
        raise InputError(
            f"loader is a {type(loader).__name__}; pass a DataLoader, batches, or tensors (X, y)"
        )
    return loader


def split_batch(batch: Any) -> tuple[list[Any], dict[str, Any], Tensor]:
    """``(positional inputs, keyword inputs, labels)`` of one batch.

    Raises:
        InputError: the batch holds no labels.
    """
    if isinstance(batch, Mapping):
        for key in ("labels", "label"):
            if key in batch:
                return [], {k: v for k, v in batch.items() if k != key}, batch[key]
        raise InputError(f"batch has keys {sorted(batch)}; one must be 'labels' or 'label'")
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
        return list(batch[:-1]), {}, batch[-1]
    raise InputError(
        f"batch is a {type(batch).__name__}; pass (inputs, labels) or a dict with 'labels'"
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def to_device(
    parts: tuple[list[Any], dict[str, Any], Tensor], device: torch.device
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """What :func:`split_batch` returned, with its tensors on ``device``."""
    args, kwargs, labels = parts
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return args, kwargs, labels.to(device)
