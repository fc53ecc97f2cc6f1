"""Values nested in dicts, lists, tuples and dataclasses: what a batch, or a model's output, is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imu_fast.errors import InputError


def is_number(value: Any) -> bool:
    """Whether this is one number, bool included, in any of the forms people have."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0 and (isinstance(value, Tensor) or value.dtype.kind in "biuf")
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _is_numeric_list(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or hasattr(value, "_fields"):
        return False
    first = value[0]
    if isinstance(first, list):
        return all(_is_numeric_list(item) for item in value)
    plain = bool | int | float | np.number | np.bool_
    return all(isinstance(item, plain) for item in value)


def is_array(value: Any) -> bool:
    """Whether this is a tensor, a numpy array of numbers, or (nested) lists of numbers."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, Tensor) or _is_numeric_list(value)


def is_text(value: Any) -> bool:
    """Whether this is a string, or a list of strings: file names, captions."""
    if isinstance(value, list | tuple) and value:
        return all(isinstance(item, str | bytes) for item in value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "USO"
    return isinstance(value, str | bytes)


def as_tensor(value: Any, floating: torch.dtype | None = None) -> Tensor:
    """A number or array as a tensor.

    Args:
        floating: dtype of what was float64 only because numpy and Python know no other; a tensor
            keeps its own.

    Raises:
        InputError: lists of different lengths.
    """
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        # Torch knows the machine's own byte order and positive strides only, and wants to write.
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        tensor = torch.from_numpy(array)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"a batch has lists of different lengths, or not of numbers ({error}); pad them to "
            "tensors, or pass a DataLoader with a collate_fn"
        ) from None
    return tensor.to(floating) if floating and tensor.dtype == torch.float64 else tensor


def fields_of(value: Any) -> dict[str, Any] | None:
    """What is in a mapping, a dataclass or a namedtuple, by name and in order; None: no names."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def mapped(
    value: Any, leaf: Callable[[Any], Any], whole: Callable[[Any], bool] = lambda value: False
) -> Any:
    """The same nesting with ``leaf`` applied to all that is no container.

    Tensors, arrays and lists of numbers are leaves, and so are texts; and what is ``whole``.
    """
    if is_array(value) or is_number(value) or is_text(value) or whole(value):
        return leaf(value)
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):  # moves itself, by .to()
        return leaf(value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: mapped(item, leaf, whole) for key, item in value.items()}
    if isinstance(value, Mapping):
        try:
            made: Any = copy.copy(value)
            for key, item in value.items():
                made[key] = mapped(item, leaf, whole)
        except TypeError:  # a mapping that cannot be written to
            return {key: mapped(item, leaf, whole) for key, item in value.items()}
        return made
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(mapped(item, leaf, whole) for item in value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(item, leaf, whole) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for name, item in (fields_of(value) or {}).items():
            object.__setattr__(made, name, mapped(item, leaf, whole))
        return made
    return leaf(value)


def copied(value: Any) -> Any:
    """The same with every tensor in memory of its own, a leaf that asks for what it asked for.

    But for those that are expanded, which nothing can be written to.
    """

    def leaf(item: Any) -> Any:
        if not isinstance(item, Tensor) or _is_expanded(item):
            return item
        return item.detach().clone().requires_grad_(item.requires_grad)

    return mapped(value, leaf)


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested:
        return False
    return any(s == 0 and k > 1 for s, k in zip(tensor.stride(), tensor.shape, strict=True))


def leaves(value: Any) -> Iterator[Any]:
    """All that is no container, in order."""
    found: list[Any] = []
    mapped(value, found.append)
    yield from found


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in it."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def batch_of_one(sample: Any, floating: torch.dtype | None) -> Any:
    """A sample as a batch: a first axis of length 1 before all that it holds.

    Args:
        floating: dtype of plain floats and of numpy's float64; None: their own.

    Raises:
        InputError: it holds something else than numbers and texts.
    """

    def leaf(value: Any) -> Any:
        if value is None:
            return None
        if is_text(value):
            return [value]
        if is_number(value) or is_array(value):
            return as_tensor(value, floating)[None]
        raise InputError(
            f"a sample holds a {type(value).__name__}, which is no number or tensor; transform it "
            "(torchvision.transforms.ToTensor for images), or pass a DataLoader with a collate_fn"
        )

    return mapped(sample, leaf)


def _is_per_sample(value: Any, n: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == n
    return is_text(value) and not isinstance(value, str | bytes) and len(value) == n


def _lists_samples(value: Any, n: int) -> bool:
    """Whether this is a list of n samples, each with tensors of its own shape (bags, images).

    And not one of n inputs with a row for each sample.
    """
    if not isinstance(value, list | tuple) or hasattr(value, "_fields") or len(value) != n:
        return False
    inside = tensors_in(value)
    return bool(inside) and not all(_is_per_sample(tensor, n) for tensor in inside)


def taken(value: Any, rows: Sequence[int], n: int) -> Any:
    """The samples ``rows`` of a batch of n; what is not per sample is kept as it is.

    Raises:
        InputError: a part cannot be cut.
    """
    if len(rows) == n and all(row == place for place, row in enumerate(rows)):
        return value

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            if _is_per_sample(item, n):
                if isinstance(rows, range) and rows.step == 1 and item.layout == torch.strided:
                    return item[rows.start : rows.stop]
                index = torch.as_tensor(list(rows), dtype=torch.int64, device=item.device)
                if item.layout == torch.sparse_coo:
                    return item.index_select(0, index)
                if item.layout != torch.strided:
                    raise InputError(
                        f"a batch holds a {item.layout} tensor, which cannot be cut into samples; "
                        "pass it .to_dense()"
                    )
                return item[index]
            if n in item.shape[1:2]:
                raise InputError(
                    f"a batch of {n} samples holds a tensor {tuple(item.shape)}, whose first axis "
                    "is not the samples'; pass a DataLoader over a map-style dataset, which can be "
                    "read sample by sample"
                )
            return item
        if _is_per_sample(item, n) or _lists_samples(item, n):
            return [item[row] for row in rows]
        if item is None or is_number(item) or is_text(item):
            return item
        raise InputError(
            f"a batch holds a {type(item).__name__}, which cannot be cut into samples; pass a "
            "DataLoader over a map-style dataset, or a batch per sample"
        )

    return mapped(value, leaf, lambda item: _lists_samples(item, n))


class _Differs(Exception):
    pass


def alike(first: Any, size: int, second: Any, other: int) -> bool:
    """Whether two batches of these sizes can be put together."""
    try:
        _joined([first, second], [size, other], dry=True)
    except _Differs:
        return False
    return True


def joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Batches of these sizes that are pairwise :func:`alike`, as one."""
    return _joined(list(values), list(sizes), dry=False)


def _joined(values: list[Any], sizes: list[int], dry: bool) -> Any:
    first = values[0]
    if len(values) == 1:
        return first
    if any(type(value) is not type(first) for value in values):
        raise _Differs
    if isinstance(first, Tensor):
        if all(_is_per_sample(v, n) for v, n in zip(values, sizes, strict=True)):
            if len({(v.shape[1:], v.dtype, v.device) for v in values}) > 1:
                raise _Differs
            return first if dry else torch.cat(values)
        if all(v is first or (v.shape == first.shape and torch.equal(v, first)) for v in values):
            return first
        raise _Differs
    if is_text(first):
        if all(_is_per_sample(v, n) for v, n in zip(values, sizes, strict=True)):
            return [item for value in values for item in value]
        if all(value == first for value in values):
            return first
    elif (parts := fields_of(first)) is not None:
        others = [fields_of(value) or {} for value in values]
        if any(other.keys() != parts.keys() for other in others):
            raise _Differs
        made = {key: _joined([other[key] for other in others], sizes, dry) for key in parts}
        return _rebuilt(first, made)
    elif all(_lists_samples(v, n) for v, n in zip(values, sizes, strict=True)):
        return first if dry else type(first)(item for value in values for item in value)
    elif isinstance(first, list | tuple):
        if len({len(value) for value in values}) > 1:
            raise _Differs
        columns = zip(*values, strict=True)
        return type(first)([_joined(list(items), sizes, dry) for items in columns])
    if all(value is first or (is_number(first) and value == first) for value in values):
        return first
    raise _Differs


def _rebuilt(like: Any, items: dict[str, Any]) -> Any:
    if isinstance(like, tuple):
        return like._make(items.values())  # type: ignore[attr-defined]
    if isinstance(like, Mapping):
        if type(like) is dict:
            return items
        made: Any = copy.copy(like)
        for key, item in items.items():
            made[key] = item
        return made
    made = copy.copy(like)
    for key, item in items.items():
        object.__setattr__(made, key, item)
    return made


def form_of(batch: Any) -> Any:
    """What batches that are read alike have in common."""

    def names(value: Any) -> Any:
        fields = fields_of(value)
        return None if fields is None else tuple(fields)

    items = tuple(names(item) for item in batch) if isinstance(batch, list | tuple) else None
    return type(batch), names(batch), items


def shown(batch: Any) -> str:
    """What a batch looks like, for messages."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor | np.ndarray):
            return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        return type(value).__name__

    fields = fields_of(batch)
    if fields is not None:
        return ", ".join(f"{key}: {one(value)}" for key, value in fields.items())
    return ", ".join(one(value) for value in batch)
