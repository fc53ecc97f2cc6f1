"""What a run belongs to: fingerprints of a model, of a forget set, of an optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.batches import ForgetSet, Parts
from imu_fast.model.head import LinearLayer
from imu_fast.model.nested import mapped


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of names and values, tensors by dtype, shape and bytes."""
    found = hashlib.sha256()
    for name, value in items:
        found.update(name.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:32]


def of_model(model: nn.Module) -> str:
    """Of every parameter and buffer, as they are now."""
    return _digest(sorted((k, v) for k, v in model.state_dict().items() if isinstance(v, Tensor)))


def of_head(theta: Tensor, has_bias: bool) -> str:
    """Of a head's weight and bias [C, D], in the model's dtype."""
    return _digest([("theta", theta), ("has_bias", has_bias)])


def of_layer(layer: LinearLayer) -> str:
    """Of an inner layer's weight and bias, in the model's dtype."""
    return of_head(layer.matrix, layer.bias is not None)


def _leaves(batch: Parts) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = [("labels", batch.labels)]
    for value in (*batch.args, *batch.kwargs.values()):
        mapped(value, lambda leaf: leaves.append(("input", leaf)))
    return leaves


def _ones(batch: Parts) -> Iterator[Parts]:
    """Its samples; the batch itself, where it cannot be cut."""
    try:
        batch.taken(range(1))
    except InputError:
        yield batch
        return
    for row in range(batch.n):
        yield batch.taken(range(row, row + 1))


class _Samples:
    """What a reading of data gave, a sample at a time, so that none is kept.

    Attributes:
        n: how many. whole, labels: of labels and inputs, and of labels alone, whatever their order.
        order: of the order of the labels and inputs; label_order of the labels alone.
    """

    def __init__(self, batches: Iterable[Parts]) -> None:
        self.n, sums = 0, [0, 0]
        orders = hashlib.sha256(), hashlib.sha256()
        for batch in batches:
            self.n += batch.n
            for one in _ones(batch):
                leaves = _leaves(one)
                for i, items in enumerate((leaves, leaves[:1])):
                    tag = _digest(items)
                    sums[i] += int(tag, 16)
                    orders[i].update(tag.encode())
        self.whole, self.labels = (f"{total % (1 << 128):032x}" for total in sums)
        self.order, self.label_order = (order.hexdigest()[:32] for order in orders)


def _begins_alike(read: Callable[[], Iterable[Parts]]) -> bool:
    """Whether two readings begin with the same batch."""
    first, second = ([_digest(_leaves(b)) for b in islice(read(), 1)] for _ in range(2))
    return first == second


def of_forget_set(name: str, forget: ForgetSet) -> dict[str, Any]:
    """Of labels and inputs, and of their order, which a run depends on too, under two names.

    Of labels alone where inputs differ between readings (augmentation).
    """
    same = _begins_alike(lambda: [forget.get([0])])
    found = _Samples(forget)
    order = [("samples", found.order if same else found.label_order)]
    return {
        name: f"{found.n} {found.whole if same else found.labels}",
        f"{name}, order": _digest([*order, ("indices", forget.dataset_indices)]),
    }


def of_data(read: Callable[[], Iterable[Parts]]) -> str:
    """Of labels and inputs, whatever their order; of what is the same in every reading.

    A loader may shuffle, and augment or leave out (``drop_last``) others each time: then of the
    labels alone, or of how many there are.
    """
    found = _Samples(read())
    again = found if _begins_alike(read) else _Samples(read())
    for kind in ("whole", "labels"):
        if getattr(found, kind) == getattr(again, kind):
            return f"{found.n} {kind} {getattr(found, kind)}"
    return str(found.n)


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its class, and the settings of its groups."""
    groups = [
        {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__qualname__, "groups": groups}
