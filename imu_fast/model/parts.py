"""A batch as a model takes it, and how to say what is what in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.nested import alike, fields_of, is_number, joined, mapped, taken

Picker = int | str | Callable[[Any], Any]


class Parts(NamedTuple):
    """One batch as a model takes it.

    Attributes:
        args, kwargs: what goes into the model, by position and by keyword.
        labels: [n, ...], int64 where they are integers.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    labels: Tensor

    @property
    def n(self) -> int:
        """Samples."""
        if not self.labels.dim():
            raise InputError("labels are one number; pass one label per sample, [n]")
        return len(self.labels)

    def mapped(self, leaf: Callable[[Any], Any]) -> Parts:
        """The same nesting with ``leaf`` applied to every tensor, and whatever else is there."""
        args = [mapped(value, leaf) for value in self.args]
        kwargs = {key: mapped(value, leaf) for key, value in self.kwargs.items()}
        return Parts(args, kwargs, leaf(self.labels))

    def taken(self, rows: Sequence[int]) -> Parts:
        """The samples ``rows``, in this order.

        Raises:
            InputError: it holds something that cannot be cut into samples.
        """
        n = self.n
        args = [taken(value, rows, n) for value in self.args]
        kwargs = {key: taken(value, rows, n) for key, value in self.kwargs.items()}
        return Parts(args, kwargs, taken(self.labels, rows, n))

    def window(self, start: int, positions: int) -> Parts:
        """Some positions of sequences: of the labels [n, T], and of all that is [n, T, ...] too."""
        length, end = self.labels.shape[1], start + positions

        def leaf(value: Any) -> Any:
            along = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == length
            # As a loader makes them: models call view() on what they are given.
            return value[:, start:end].contiguous() if along else value

        return self.mapped(leaf)

    def alike(self, other: Parts) -> bool:
        """Whether the two can be one batch: the same shapes, but for the number of samples."""
        return alike(tuple(self), self.n, tuple(other), other.n)

    @staticmethod
    def joined(batches: Sequence[Parts]) -> Parts:
        """Batches that are pairwise :meth:`alike` as one, in order."""
        return Parts(*joined([tuple(b) for b in batches], [b.n for b in batches]))

    @staticmethod
    def gathered(batches: Iterable[Parts], size: int) -> Iterator[Parts]:
        """Neighbours that are alike, put together to at most ``size`` samples."""
        waiting: list[Parts] = []
        total = 0
        for batch in batches:
            if waiting and (total + batch.n > size or not waiting[0].alike(batch)):
                yield Parts.joined(waiting)
                waiting, total = [], 0
            waiting.append(batch)
            total += batch.n
        if waiting:
            yield Parts.joined(waiting)


@dataclass(frozen=True)
class Data:
    """Data together with what is what in a batch, for where that cannot be seen.

    Every argument of the package that takes data takes this.

    Args:
        loader: whatever else could be passed: a DataLoader, a dataset, batches, tensors.
        labels: index, key or function of the batch that gives the labels.
        inputs: the same for what goes into the model: one picker (one input by position), a list
            of them (several by position), a dict (by keyword), or a function of the batch that
            returns a tuple (by position), a dict (by keyword) or one input. None: what stands
            before the labels, or beside them in a dict.

    Example:
        ``Data(loader, inputs={"input_ids": 0, "attention_mask": 1}, labels=3)``
    """

    loader: Any
    labels: Picker | None = None
    inputs: Picker | Sequence[Picker] | Mapping[str, Picker] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loader, Data):
            raise InputError("loader is a Data already; give inputs and labels to one of the two")
        if self.labels is None and self.inputs is not None:
            raise InputError("labels=None: with inputs, say where the labels are as well")
        if callable(self.labels) and self.inputs is None:
            raise InputError("inputs=None: where labels is a function, say what the inputs are")

    def pick(self, batch: Any) -> tuple[list[Any], dict[str, Any], Any] | None:
        """Inputs by position, by keyword, and labels; None: inputs follow from the rules."""
        if self.labels is None or self.inputs is None:
            return None
        labels = pick(batch, self.labels, "labels")
        if isinstance(self.inputs, Mapping):
            return [], {k: pick(batch, p, "inputs") for k, p in self.inputs.items()}, labels
        if isinstance(self.inputs, Sequence) and not isinstance(self.inputs, str):
            return [pick(batch, p, "inputs") for p in self.inputs], {}, labels
        found = pick(batch, self.inputs, "inputs")
        if callable(self.inputs) and isinstance(found, tuple):
            return list(found), {}, labels
        if callable(self.inputs) and isinstance(found, Mapping):
            return [], dict(found.items()), labels
        return [found], {}, labels


def pick(batch: Any, picker: Picker, name: str) -> Any:
    if callable(picker):
        return picker(batch)
    fields = fields_of(batch)
    if isinstance(picker, str) and fields is not None and picker in fields:
        return fields[picker]
    items = batch if isinstance(batch, list | tuple) else None
    if isinstance(picker, int) and items is not None and -len(items) <= picker < len(items):
        return items[picker]
    has = f"keys {sorted(map(str, fields))}" if fields is not None else f"{type(batch).__name__}"
    has = f"{len(items)} items" if items is not None and fields is None else has
    raise InputError(f"{name}={picker!r} is not in a batch, which has {has}")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def to_device(parts: Parts, device: torch.device) -> Parts:
    """A batch with all that it holds on ``device``, and usable by autograd."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta and device.type != "meta":
                raise InputError(
                    f"a batch holds a {value.dtype} tensor of shape {tuple(value.shape)} on the "
                    "meta device, which has no values; load the data outside torch.device('meta')"
                )
            value = value.to(device)
            # A tensor made under torch.inference_mode() cannot be saved for a backward pass.
            return value.clone() if value.is_inference() else value
        move = getattr(value, "to", None)  # batches of other libraries
        return move(device) if callable(move) and not is_number(value) else value

    return parts.mapped(leaf)
