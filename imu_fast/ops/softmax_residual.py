"""The signal of a softmax head: ``delta = c (softmax(z) - onehot(y))`` and the loss, one pass."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.ops.extension import SUFFIX, loaded_for, threads_for
from imu_fast.ops.operation import kernel_dtypes, operation

# Up to so many classes a softmax over rows leaves most of a vector register empty.
_NARROW = 16


def linear_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``features W^T + b``: [N, C], class by class in memory where few classes make that faster."""
    if len(weight) > _NARROW or features.device.type != "cpu":
        return torch.nn.functional.linear(features, weight, bias)
    if bias is None:
        return (weight @ features.t()).t()
    return torch.addmm(bias[:, None], weight, features.t()).t()


def _kernel_limits(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> str:
    return kernel_dtypes(logits)


def _launch(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from imu_fast.kernels import softmax_residual as kernel

    return kernel.softmax_residual(logits, labels, scale)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return logits.dtype if logits.dtype == torch.float64 else torch.float32


def _by_definition(
    reference: ModuleType, logits: Tensor, labels: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    ones = logits.new_ones(len(logits)) if scale is None else scale
    delta, loss = reference.softmax_residual(logits, labels, ones)
    return delta.to(_compute_dtype(logits)), loss.to(_compute_dtype(logits))


@operation(reference=_by_definition, kernel=_launch, limits=_kernel_limits)
def softmax_residual(
    logits: Tensor, labels: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual and loss of the cross-entropy.

    The label's entry is minus the sum of the other probabilities, not ``p_y - 1``: for a confident
    sample the latter cancels and loses every digit of the gradient. The same sum gives the loss.

    Args:
        logits: [N, C], any floating dtype; half precision is computed in float32.
        labels: [N] int64 in [0, C) (validated once, at capture).
        scale: [N], the ``c_i`` of each token (``1/T_i``); None means 1.

    Returns:
        delta [N, C] in the logits' dtype (float32 for half precision) and loss [N], scaled.
    """
    compute = _compute_dtype(logits)
    scale = None if scale is None else scale.to(compute)
    logits = logits.to(compute)
    # Few classes are normalised with the tokens side by side.
    narrow = logits.shape[1] <= _NARROW
    p = torch.softmax(logits.t(), dim=0).t() if narrow else torch.softmax(logits, dim=1)
    found = loaded_for(logits)
    if found is None or not _is_plain(p, labels, scale):
        return _by_torch(p, logits, labels, scale)
    return _by_extension(found, p, logits, labels, scale)


def _is_plain(p: Tensor, labels: Tensor, scale: Tensor | None) -> bool:
    """Whether shapes and dtypes are what memory is read by; others torch takes, or refuses."""
    tokens = p.shape[:1]
    fits = labels.shape == tokens and (scale is None or scale.shape == tokens)
    return bool(fits and labels.dtype == torch.int64 and p.numel())


def _by_torch(
    delta: Tensor, logits: Tensor, labels: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the softmax, which it changes."""
    column = labels[:, None]
    # -log p_y out of the logits, where p_y underflows: the largest p is 1 over the normaliser.
    behind = logits.amax(dim=1) - logits.gather(1, column)[:, 0]
    loss = behind.sub_(delta.amax(dim=1).log_())
    delta.scatter_(1, column, 0.0)
    others = delta.sum(dim=1)
    delta.scatter_(1, column, -others[:, None])
    delta = delta.contiguous()
    loss = torch.where(others < 0.5, -torch.log1p(-others), loss)
    if scale is not None:
        delta.mul_(scale[:, None])
        loss = loss * scale
    return delta, loss


def _by_extension(
    found: Any, p: Tensor, logits: Tensor, labels: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in one pass over memory."""
    p = p if p.stride(0) == 1 else p.contiguous()
    delta = p if p.is_contiguous() else torch.empty_like(p, memory_format=torch.contiguous_format)
    loss = p.new_empty(len(p))
    labels = labels.contiguous()
    scale = None if scale is None else scale.contiguous()
    wrong = getattr(found, f"softmax_residual_{SUFFIX[p.dtype]}")(
        (p.data_ptr(), *p.stride()),
        (logits.data_ptr(), *logits.stride()),
        labels.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        delta.data_ptr(),
        loss.data_ptr(),
        *p.shape,
        threads_for(p.numel()),
    )
    if wrong >= 0:
        raise InputError(
            f"labels[{wrong}]={int(labels[wrong])} is out of range; classes are 0 to "
            f"{p.shape[1] - 1}"
        )
    return delta, loss
