"""Data in two: what is to be forgotten, and what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from imu_fast.errors import InputError, check_positive, check_seed, check_tensor
from imu_fast.model.forward import LABEL_NAMES
from imu_fast.model.labels import as_labels, is_integer
from imu_fast.model.nested import fields_of
from imu_fast.model.parts import Data, pick

_SAY = "say where they are: imu_fast.Data(data, labels=...), an index, a key or a function"


def split(
    data: Any,
    *,
    classes: int | Sequence[int] | None = None,
    fraction: float | None = None,
    indices: Any = None,
    seed: int | None = None,
) -> tuple[Any, Any]:
    """Split data into ``(forget, retain)``, by exactly one of classes, fraction and indices.

    Args:
        data: tensors or numpy arrays, ``(X, y)``, ``(X, Z, y)`` or a dict of them, n rows each; a
            map-style dataset of n samples; or an :class:`imu_fast.Data` around one of these.
        classes: forget every sample whose label is this class, or one of these. A label is the last
            of two parts, or what is called label, labels, target, ... in a dict, a namedtuple or a
            dataclass; of more parts, what ``imu_fast.Data(data, labels=...)`` says. Every sample
            of a dataset is read once for it (no more than the length is asked of one otherwise).
        fraction: in (0, 1); forget ``round(fraction * n)`` samples, drawn without replacement.
        indices: [k] integers in [0, n), each once; forget these, in this order.
        seed: of ``fraction``; default 0. The same on every machine and for every form of data.

    Returns:
        Two of the same kind: tensors or arrays in the container they came in (copies), or a
        ``torch.utils.data.Subset`` of the dataset; a :class:`imu_fast.Data` around either, where
        one was given. Samples stay in their order (``indices``: in the one given).

    Raises:
        InputError: none or several of the three; a class that no label is; indices out of range or
            twice; nothing to forget, or nothing that stays; labels that are not one integer each.
    """
    given = {"classes": classes, "fraction": fraction, "indices": indices}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(
            f"split() has {' and '.join(named) or 'none of classes, fraction and indices'}; pass "
            "exactly one: classes=, fraction= or indices="
        )
    if seed is not None:
        if fraction is None:
            raise InputError(f"seed={seed!r}: {named[0]} draws nothing; leave it out")
        seed = check_seed("seed", seed)
    inner = data.loader if isinstance(data, Data) else data
    n = _length(inner)
    if classes is not None:
        rows = _of_classes(labels_of(data), classes)
    elif fraction is not None:
        rows = drawn(n, fraction, seed)
    else:
        rows = _chosen(n, indices)
    forgotten = set(rows)
    if len(forgotten) == n:
        raise InputError(
            f"{named[0]}={_shown(given[named[0]])} forgets all {n} samples; leave some that stay"
        )
    parts = rows, [row for row in range(n) if row not in forgotten]
    first, second = (_taken(inner, part) for part in parts)
    if isinstance(data, Data):
        return replace(data, loader=first), replace(data, loader=second)
    return first, second


def drawn(n: int, fraction: float, seed: int | None = None) -> list[int]:
    """``round(fraction * n)`` of the rows 0 ... n - 1, ascending.

    Raises:
        InputError: not in (0, 1), or so small that it is no sample.
    """
    number = check_positive("fraction", fraction)
    if number >= 1:
        raise InputError(f"fraction={fraction!r} must lie in (0, 1); leave some that stay")
    count = round(number * n)
    if count == 0:
        raise InputError(
            f"fraction={fraction!r} of {n} samples is none; pass at least {1 / n:.2g}, or indices="
        )
    generator = torch.Generator(device="cpu").manual_seed(0 if seed is None else seed)
    order = torch.randperm(n, generator=generator, device="cpu")
    return sorted(order[:count].tolist())


def labels_of(data: Any) -> Tensor:
    """The label of every sample, [n] int64 on the CPU.

    Args:
        data: as of :func:`split`.

    Raises:
        InputError: they cannot be found, or are not one integer per sample.
    """
    inner, told = (data.loader, data.labels) if isinstance(data, Data) else (data, None)
    if _is_columns(inner):
        labels = as_labels(_label(inner, told))
        n = _length(inner)
    else:
        n = len(inner)
        labels = as_labels([_plain(_label(inner[row], told), row) for row in range(n)])
    if labels.shape != (n,) or not is_integer(labels.dtype):
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and {labels.dtype} for {n} samples; classes "
            f"needs one integer each: pass indices= or fraction=, or {_SAY}"
        )
    return labels.cpu()


def _label(batch: Any, told: Any) -> Any:
    """The labels in all samples, or the label in one."""
    if told is not None:
        return pick(batch, told, "labels")
    fields = fields_of(batch)
    if fields is not None:
        found = [name for name in LABEL_NAMES if fields.get(name) is not None]
        if len(found) == 1:
            return fields[found[0]]
        has = " and ".join(map(repr, found)) or f"keys {sorted(map(str, fields))}, none of a label"
        raise InputError(f"data has {has}; {_SAY}")
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    what = type(batch).__name__
    what += f" of {len(batch)} parts" if isinstance(batch, list | tuple) else ""
    raise InputError(f"data: which part of a {what} is the labels does not show; {_SAY}")


def _plain(label: Any, row: int) -> Any:
    """A sample's label as a number; one number in brackets is it too, as in a batch of one."""
    found = as_labels(label)
    if found.numel() != 1:
        raise InputError(
            f"the label of sample {row} has shape {tuple(found.shape)}; classes needs one integer "
            f"each: pass indices= or fraction=, or {_SAY}"
        )
    return found.item()


def _of_classes(labels: Tensor, classes: Any) -> list[int]:
    wanted = [classes] if _is_integer(classes) else classes
    if isinstance(wanted, Tensor | np.ndarray):
        wanted = wanted.reshape(-1).tolist()
    iterable = isinstance(wanted, Sequence | set | frozenset | range) and not isinstance(
        wanted, str | bytes
    )
    if not iterable or not len(wanted) or not all(map(_is_integer, wanted)):
        raise InputError(f"classes={_shown(classes)} must be one class index, or several")
    present = set(labels.tolist())
    missing = sorted({int(one) for one in wanted} - present)
    if missing:
        raise InputError(
            f"classes={_shown(classes)}: no label is {', '.join(map(str, missing[:5]))}; there are "
            f"{_shown(sorted(present))}"
        )
    chosen = torch.isin(labels, torch.tensor([int(one) for one in wanted]))
    return torch.nonzero(chosen).flatten().tolist()


def _chosen(n: int, indices: Any) -> list[int]:
    shown = f"indices={_shown(indices)}"
    rows = indices.tolist() if isinstance(indices, Tensor | np.ndarray) else indices
    try:
        rows = list(rows)
    except TypeError:
        rows = [None]
    if not all(map(_is_integer, rows)):
        raise InputError(f"{shown} must be integers [k]; of a mask pass mask.nonzero()[:, 0]")
    if not rows:
        raise InputError(f"{shown} is empty; name what is to be forgotten")
    rows = [int(row) for row in rows]
    wrong = [row for row in rows if not 0 <= row < n]
    if wrong:
        raise InputError(f"{shown}: {wrong[0]} is outside [0, {n}); there are {n} samples")
    if len(set(rows)) < len(rows):
        twice = next(row for place, row in enumerate(rows) if row in rows[:place])
        raise InputError(f"{shown} has {twice} twice; name every sample once")
    return rows


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0 and _is_integer(value.item())
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _columns(data: Any) -> list[Any]:
    return list(data.values()) if isinstance(data, Mapping) else list(data)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def _is_columns(data: Any) -> bool:
    """Whether this is all samples in one: arrays, side by side or by name."""
    if not isinstance(data, Mapping | list | tuple):
        return False
    columns = _columns(data)
    return bool(columns) and all(map(_is_array, columns))


def _length(data: Any) -> int:
    """How many samples there are.

    Raises:
        InputError: this cannot be split, or has none.
    """
    what = type(data).__name__
    if isinstance(data, DataLoader):
        raise InputError("data is a DataLoader; split its dataset: split(loader.dataset, ...)")
    if _is_columns(data):
        for column in _columns(data):
            if isinstance(column, Tensor):  # of numbers, with rows that can be taken
                check_tensor("data", column, "any", "[n, ...]")
        lengths = [len(column) for column in _columns(data)]
        if len(set(lengths)) > 1:
            raise InputError(f"data has columns of {lengths} rows; they must have as many")
        n = lengths[0]
    else:
        readable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        container = isinstance(data, Mapping | list | tuple | str | bytes | Tensor | np.ndarray)
        if not readable or container or isinstance(data, IterableDataset):
            raise InputError(
                f"data is a {what}; pass tensors or arrays (X, y), a dict of them, or a map-style "
                "dataset (with __getitem__ and __len__)"
            )
        n = len(data)
    if n == 0:
        raise InputError("data is empty; pass at least two samples")
    return n


def _taken(data: Any, rows: list[int]) -> Any:
    if not _is_columns(data):
        return Subset(data, rows)

    def of(column: Any) -> Any:
        if isinstance(column, Tensor):
            return column[torch.tensor(rows, dtype=torch.int64, device=column.device)]
        return column[np.array(rows, dtype=np.int64)]

    if isinstance(data, Mapping):
        return {name: of(column) for name, column in data.items()}
    columns = [of(column) for column in data]
    if hasattr(data, "_fields"):  # a namedtuple
        return type(data)(*columns)
    return columns if isinstance(data, list) else tuple(columns)
