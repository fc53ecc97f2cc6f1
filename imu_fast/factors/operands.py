"""What factors are made of, checked before any work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imu_fast.errors import (
    InputError,
    brief,
    check_finite_rows,
    check_same_device,
    check_tensor,
    is_finite,
)
from imu_fast.ops.tokens import lengths

Array = Tensor | np.ndarray[Any, Any] | Sequence[Any]
"""What is taken for a tensor: one, an array of numpy, mapped files too, or (nested) lists."""


HALF = (torch.bfloat16, torch.float16)


def input_dtype(act: torch.dtype, delta: torch.dtype) -> torch.dtype:
    """What inputs are kept in: half precision as it is beside a float32 signal, else the signal's.

    Half of the memory, and every number of it is one of float32, in which it is computed with.
    """
    return act if act in HALF and delta == torch.float32 else delta


def check_dtypes(delta: Tensor, act: Tensor) -> None:
    """Raise InputError unless delta is float32 or float64, and act alike or half precision."""
    wide = delta.dtype in (torch.float32, torch.float64)
    if not wide or act.dtype != input_dtype(act.dtype, delta.dtype):
        raise InputError(
            f"delta is {delta.dtype} and act is {act.dtype}; both must be float32 or float64, or "
            "act bfloat16 or float16 beside a float32 delta"
        )


def narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In ``dtype`` where that is narrower, rounded to the nearest.

    Raises:
        InputError: a number is beyond its range.
    """
    if dtype is None or tensor.itemsize <= dtype.itemsize:
        return tensor
    found = tensor.to(dtype)
    if not is_finite(found):
        raise InputError(
            f"dtype={dtype} cannot hold these gradients, up to {float(tensor.abs().max()):.3g}; "
            "pass dtype=torch.float64"
        )
    return found


def check_target(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise InputError unless factors can be moved to ``device`` and cast to ``dtype``."""
    if dtype is not None and dtype not in (torch.float64, torch.float32, *HALF):
        raise InputError(
            f"dtype={dtype!r} is none of torch.float64, torch.float32, torch.bfloat16 and "
            "torch.float16; choose one of these, or None"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device={device!r} cannot be used here: {brief(error)}") from error


def cast(
    name: str, tensor: Tensor, dtype: torch.dtype | None, what: str, small: bool = True
) -> Tensor:
    """``tensor`` [N, ...] in ``dtype``, every row to its precision.

    Args:
        what: a row is. small: whether rows that are below the range matter too: by a bias or a
            weight that is, a logit is off by less than any rounding of it.

    Raises:
        InputError: numbers are beyond the range, or all of a row below it, where digits are lost.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    found, limits, own = tensor.to(dtype), torch.finfo(dtype), torch.finfo(tensor.dtype)
    if own.max <= limits.max and own.tiny >= limits.tiny:
        return found
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    size = torch.linalg.vector_norm(rows, torch.inf, dim=1)  # without a copy
    beyond = ~size.to(dtype).isfinite()
    below = (size > 0) & (size < limits.tiny) & small
    lost = torch.nonzero(beyond | below)
    if len(lost):
        i = int(lost[0])
        why = "beyond its range" if beyond[i] else "so small that it loses their digits"
        single = torch.finfo(torch.float32)
        half = dtype == torch.float16 and single.tiny <= float(size[i]) <= single.max
        wider = "torch.bfloat16 or torch.float32" if half else "torch.float64"
        raise InputError(
            f"dtype={dtype} cannot hold {name}: {what} {i} has numbers up to {float(size[i]):.3g}, "
            f"{why}; pass dtype={wider}"
        )
    return found


def tensor_of(name: str, value: Array) -> Tensor:
    """A value as a tensor; of an array in the same memory, where torch can have it.

    Lists of floating numbers are float64, as Python has them.

    Raises:
        InputError: it is neither a tensor nor an array or list of numbers.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray | list | tuple):
        raise InputError(
            f"{name} is a {type(value).__name__}; pass a tensor, an array of numpy or a list"
        )
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(
            f"{name} has masked entries, which a tensor does not have; pass {name}.filled(value), "
            "or leave these samples out"
        )
    try:
        array = np.asarray(value)
        plain = np.asarray(array, array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in plain.strides):
            plain = plain.copy()
        with warnings.catch_warnings():
            # Of memory that may only be read; nothing here writes to its operands.
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.from_numpy(plain)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} holds no numbers of torch ({brief(error, 100)})") from error


def check_offsets(offsets: Tensor, num_tokens: int) -> None:
    """Raise InputError unless offsets [n+1] cut ``num_tokens`` tokens into n >= 1 samples."""
    check_tensor("offsets", offsets, "integer", "[n+1]")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise InputError(
            f"offsets has shape {tuple(offsets.shape)}: an empty forget set; pass [n+1] with n >= 1"
        )
    first, last, fewest, _ = lengths(offsets)
    if (first, last) != (0, num_tokens) or fewest < 0:
        raise InputError(
            f"offsets must rise from 0 to N={num_tokens}; they go from {first} to {last}"
        )


def remaining(offsets: Tensor, valid: Tensor) -> Tensor:
    """Offsets [n+1] of the tokens that are valid [N]."""
    before = torch.zeros(len(valid) + 1, dtype=torch.int64)
    before[1:] = valid.cpu().cumsum(0)
    return before[offsets]


def check_operands(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """Raise InputError unless shapes and devices of a head and its labels fit."""
    check_tensor("features", features, "floating", "[N, d]")
    check_tensor("weight", weight, "floating", "[C, d]")
    check_tensor("labels", labels, "real", "[N]")
    if bias is not None:
        check_tensor("bias", bias, "floating", "[C]")
    if features.dim() != 2 or features.shape[0] == 0:
        raise InputError(
            f"features has shape {tuple(features.shape)}; pass [N, d] with N >= 1 samples"
        )
    if features.shape[1] == 0:
        raise InputError(f"features has shape {tuple(features.shape)}; pass [N, d] with d >= 1")
    if weight.dim() == 2 and weight.shape[0] == 0:
        raise InputError(f"weight has shape {tuple(weight.shape)}; pass [C, d] with C >= 1")
    if weight.dim() != 2 or weight.shape[1] != features.shape[1]:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}, features {tuple(features.shape)}; "
            "expected weight [C, d] with the features' d"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    if labels.shape[:1] != features.shape[:1]:
        raise InputError(
            f"labels has shape {tuple(labels.shape)}; expected ({features.shape[0]},), or "
            f"({features.shape[0]}, {weight.shape[0]}) where the loss takes one per output"
        )
    for tensor, label in ((weight, "weight"), (labels, "labels"), (bias, "bias")):
        if tensor is not None:
            check_same_device("features", features, label, tensor)


def check_finite(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise InputError naming the first sample or class with a number that is not finite."""
    check_finite_rows("features", features)
    check_finite_rows("weight", weight, "class")
    if bias is not None:
        check_finite_rows("bias", bias, "class")


def check_result(what: str, result: Tensor, *sources: Any) -> Tensor:
    """Return ``result``, or raise InputError where it is not finite, naming the sample to blame.

    One reduction of what comes out, in place of one of all that goes in.

    Args:
        sources: the factors that it was made of.
    """
    if is_finite(result):
        return result
    for source in sources:
        for name in ("delta", "act", "features"):
            part = getattr(source, name, None)
            if isinstance(part, Tensor) and part.dim() and len(part):
                check_finite_rows(name, part, "token")
    wide = result.dtype == torch.float64
    way = "features in smaller units" if wide else "factors.to(dtype=torch.float64)"
    raise InputError(
        f"{what} is beyond the range of {result.dtype}: the factors are too large for it, or "
        f"damping is too small; pass {way}, or a larger damping"
    )
