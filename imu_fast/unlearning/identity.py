"""What a run belongs to: fingerprints of a model, of a forget set, of an optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
    leaves: list[tuple[str, Any]] = []
    for value in (*batch.args, *batch.kwargs.values()):
        mapped(value, lambda leaf: leaves.append(("input", leaf)))
    return leaves


def of_forget_set(forget: ForgetSet) -> str:
    """Of labels and inputs; of labels alone where inputs differ between readings (augmentation)."""
    first = _digest(_leaves(forget.get([0])))
    same = first == _digest(_leaves(forget.get([0])))
    items: list[tuple[str, Any]] = [("n", forget.n), ("indices", forget.dataset_indices)]
    for batch in forget:
        items.append(("labels", batch.labels))
        if same:
            items += _leaves(batch)
    return _digest(items)


def of_data(batches: Iterable[Parts]) -> str:
    """Of labels and inputs of every batch."""
    items: list[tuple[str, Any]] = []
    for batch in batches:
        items += [("labels", batch.labels), *_leaves(batch)]
    return _digest(items)


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its class, and the settings of its groups."""
    groups = [
        {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__qualname__, "groups": groups}
