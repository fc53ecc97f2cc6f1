"""A head that says what its logits would be like, instead of computing them.

A model that returns its head's output and does nothing else with it needs no logits where only the
head's input is asked for, and those of a vocabulary are the largest tensor there is. So the head's
forward gives a tensor of their shape and dtype that holds one NaN per row; where the model returns
that very tensor, row by row, the logits would have been the head's output, and where it returns
anything else they have to be computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from imu_fast.model import calls
from imu_fast.model.head import LinearLayer


class Unstored:
    """What the head returned in place of its outputs, call by call."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def is_returned_as(self, logits: Tensor) -> bool:
        """Whether the logits are the one output: its memory, row by row, never written to."""
        if len(self.made) != 1:
            return False
        (out,) = self.made
        return (
            logits.data_ptr() == out.data_ptr()
            and logits.dtype == out.dtype
            and logits.shape[-1] == out.shape[-1]
            and logits.numel() == out.numel()
            and logits.stride(-1) == 0
            and calls.rows_in_order(logits[..., 0])
            and (logits.is_inference() or logits._version == 0)
            and bool(out[..., 0].isnan().all())
        )


def may_be_unstored(layer: LinearLayer) -> bool:
    """Whether the layer computes ``act W^T + b`` by torch's own code, watched by nobody."""
    module = layer.module
    forward = getattr(module.forward, "__func__", None)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return forward is nn.Linear.forward and not layer.derived and not any(hooks)


def is_large(layer: LinearLayer, rows: int) -> bool:
    """Whether outputs for so many rows are worth not to be computed."""
    return rows > fitting(layer)


def fitting(layer: LinearLayer) -> int:
    """For how many rows outputs are not large."""
    return calls.SMALL_BYTES // (layer.width * layer.weight.itemsize)


@contextmanager
def unstored(layer: LinearLayer) -> Iterator[Unstored]:
    """Large outputs of the layer are not computed in the body; its forward is put back, always."""
    module, found = layer.module, Unstored()
    real = module.forward

    def forward(input: Tensor) -> Tensor:
        if not is_large(layer, math.prod(input.shape[:-1])):
            return real(input)
        dtype = real(input.reshape(-1, input.shape[-1])[:0]).dtype  # under autocast, say
        rows = input.new_full((*input.shape[:-1], 1), math.nan, dtype=dtype)
        found.made.append(rows.expand(*input.shape[:-1], layer.width))
        return found.made[-1]

    module.forward = forward
    try:
        yield found
    finally:
        del module.forward
