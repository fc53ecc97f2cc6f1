"""What a run belongs to: fingerprints of a model, of a forget set, of an optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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


def _is_of_samples(value: Any, n: int) -> bool:
    """Whether it is a dense tensor with an axis of n samples first."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.dim() > 0
    return dense and len(value) == n


def _tags(batch: Parts) -> Iterator[tuple[bytes, bytes]]:
    """Of each sample a digest of its label and inputs, and of its label; of a batch, if uncut."""
    leaves, n = _leaves(batch), batch.n
    if all(_is_of_samples(value, n) for _, value in leaves):
        plain = [value.detach().cpu().contiguous().reshape(n, -1) for _, value in leaves]
        bytes_of = [t.view(torch.uint8).numpy() if t.numel() else t.numpy() for t in plain]
        kinds = [f"{k}{v.dtype}{tuple(v.shape[1:])}".encode() for k, v in leaves]
        for row in range(n):
            found = hashlib.sha256(b"".join(kinds))
            found.update(bytes_of[0][row].data)
            label = found.digest()
            for rest in bytes_of[1:]:
                found.update(rest[row].data)
            yield found.digest(), label
        return
    ones = [batch]
    with suppress(InputError):  # it cannot be cut
        ones = [batch.taken(range(row, row + 1)) for row in range(n)]
    for one in ones:
        leaves = _leaves(one)
        yield _digest(leaves).encode(), _digest(leaves[:1]).encode()


class _Samples:
    """What a reading of data gave, a batch at a time, so that none is kept.

    Attributes:
        n: how many. whole, labels: of labels and inputs, and of labels alone, whatever their order.
        order, label_order: the same in their order.
    """

    def __init__(self, batches: Iterable[Parts]) -> None:
        self.n, sums = 0, [0, 0]
        orders = hashlib.sha256(), hashlib.sha256()
        for batch in batches:
            self.n += batch.n
            for tags in _tags(batch):
                for i, tag in enumerate(tags):
                    sums[i] += int.from_bytes(tag, "big")
                    orders[i].update(tag)
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
