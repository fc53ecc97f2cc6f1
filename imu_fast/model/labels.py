"""Labels in the forms people have them: what they may be, and class indices out of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imu_fast.errors import InputError, check_tensor
from imu_fast.model.nested import as_tensor, is_array, is_number

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype is an integer of any width; bool is none."""
    return dtype in _INTEGERS


def as_labels(value: Any) -> Tensor:
    """Labels as a tensor: int64 where they are integers, and otherwise in a dtype of their own.

    Args:
        value: a tensor, a numpy array, or lists of numbers.

    Raises:
        InputError: names of classes, or something that is not one array.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        value = value.tolist()
    if isinstance(value, list | tuple) and value and all(map(is_number, value)):
        value = [v.item() if isinstance(v, Tensor | np.ndarray) else v for v in value]
    if not (is_array(value) or is_number(value)):
        what = type(value).__name__
        if isinstance(value, list | tuple) and value:
            what += f" of {type(value[0]).__name__}"
        raise InputError(
            f"labels are a {what}; pass integer class indices, one array for all samples of a "
            "batch; to say where they are: imu_fast.Data(loader, labels=...), an index, a key or "
            "a function of the batch"
        )
    labels = check_tensor("labels", as_tensor(value), "any").detach()  # of a teacher, say
    return labels.to(torch.int64) if is_integer(labels.dtype) else labels


def check_classes(logits_shape: torch.Size | tuple[int, ...]) -> None:
    """Raise InputError for logits [..., 1] under a softmax."""
    if logits_shape[-1] == 1:
        raise InputError(
            f"logits have shape {tuple(logits_shape)}, of one class: its probability is one and "
            "the cross-entropy zero, whatever the model says. Where one logit tells two classes "
            "apart make two of it, output=lambda o: torch.cat([torch.zeros_like(o), o], -1), or "
            "take scores with loss='binary_cross_entropy'"
        )


def class_labels(labels: Tensor, logits_shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Class indices, one per row of the logits.

    Args:
        labels: of any integer dtype, in the logits' shape without classes, or with an axis of
            length 1 in their place.
        logits_shape: [..., C].

    Returns:
        int64, of shape ``logits_shape[:-1]``. Whether they lie in [0, C) is not looked at.

    Raises:
        InputError: bool, floating, or of another shape; there is one class.
    """
    rows = tuple(logits_shape[:-1])
    if len(rows) == 1:  # of more axes the last need not be the classes
        check_classes(logits_shape)
    if labels.dtype == torch.bool:
        raise InputError(
            "labels have dtype torch.bool; pass class indices: labels.long() for two classes"
        )
    if not is_integer(labels.dtype):
        soft = tuple(labels.shape) == tuple(logits_shape)
        raise InputError(
            f"labels have dtype {labels.dtype}"
            + (
                " and the logits' shape: one-hot or soft labels, which are not supported here; "
                "pass labels.argmax(-1) where they are one-hot"
                if soft
                else "; pass integer class indices: labels.long()"
            )
        )
    if tuple(labels.shape) == (*rows, 1):
        labels = labels[..., 0]
    if tuple(labels.shape) != rows:
        way_out = _as_rows(tuple(labels.shape), tuple(logits_shape))
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, logits {tuple(logits_shape)}; expected one "
            f"label per row of logits, classes last: {way_out}"
        )
    check_classes(logits_shape)
    return labels.to(torch.int64)


def _as_rows(labels: tuple[int, ...], logits: tuple[int, ...]) -> str:
    """What makes rows that these labels fit of logits of another layout."""
    n = labels[0] if labels else 0
    single = labels[1:] in ((), (1,))
    if single and logits[1:] == (n,):
        return "output=lambda o: o.T"
    if len(logits) == len(labels) + 1 and logits[:1] + logits[2:] == labels:
        return "output=lambda o: o.movedim(1, -1)"
    if len(logits) == 3 and (logits[1], logits[0]) == labels:
        return "output=lambda o: o.transpose(0, 1)"
    if not single or logits[0] != n or len(logits) < 3:
        return "choose the rows of the labels by output=, a function of what the model returns"
    if max(logits[1:]) == math.prod(logits[1:]):
        return "output=lambda o: o.flatten(1)"
    positions = ", ".join([":"] + ["0"] * (len(logits) - 2))
    return (
        "one label a sample is for one row: where classes come last output=lambda o: "
        f"o[{positions}], or the mean, o.flatten(1, -2).mean(1); where they come second "
        "output=lambda o: o.flatten(2).mean(2); or give labels of every position"
    )


def labels_fit(labels: Tensor, logits: Tensor) -> bool:
    """Whether these may be the labels of these logits [..., C]: in shape, and in range."""
    if logits.dim() < 2 or not logits.is_floating_point():
        return False
    rows, classes = tuple(logits.shape[:-1]), logits.shape[-1]
    shape = tuple(labels.shape)
    if not is_integer(labels.dtype):
        return shape in (rows, (*rows, 1), (*rows, classes))
    # Negative: some ignore_index.
    return shape in (rows, (*rows, 1)) and (labels.numel() == 0 or int(labels.max()) < classes)
