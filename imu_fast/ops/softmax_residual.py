"""The signal of a softmax head: ``delta = c (softmax(z) - onehot(y))`` and the loss, one pass."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

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
    column = labels[:, None]
    # Few classes are normalised with the tokens side by side.
    if logits.shape[1] <= _NARROW:
        delta = torch.softmax(logits.t(), dim=0, dtype=compute).t()
    else:
        delta = torch.softmax(logits, dim=1, dtype=compute)
    # -log p_y out of the logits, where p_y underflows: the largest p is 1 over the normaliser.
    behind = logits.amax(dim=1).to(compute) - logits.gather(1, column)[:, 0].to(compute)
    loss = behind.sub_(delta.amax(dim=1).log_())
    delta.scatter_(1, column, 0.0)
    others = delta.sum(dim=1)
    delta.scatter_(1, column, -others[:, None])
    delta = delta.contiguous()
    loss = torch.where(others < 0.5, -torch.log1p(-others), loss)
    if scale is not None:
        scale = scale.to(compute)
        delta.mul_(scale[:, None])
        loss = loss * scale
    return delta, loss
