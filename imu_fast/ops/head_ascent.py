"""One reweighted ascent step at a softmax head on cached features, in closed form."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.objective import objective, objective_residual
from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation
from imu_fast.ops.softmax_residual import linear_logits, softmax_residual


def head_logits(features: Tensor, theta: Tensor, has_bias: bool) -> Tensor:
    """``a~ @ theta.T`` without storing a~, in theta's dtype: [B, d] and [C, D] to [B, C]."""
    d, features = features.shape[1], features.to(theta.dtype)
    return torch.nn.functional.linear(features, theta[:, :d], theta[:, d] if has_bias else None)


def _decide(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    return features, theta


def _gradient_by_definition(
    reference: ModuleType,
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    operands = (features, labels, weights, theta, *rest)
    gradient, loss = reference.head_ascent_gradient(*operands, **named)
    return gradient.to(theta.dtype), loss.to(theta.dtype)


@operation(reference=_gradient_by_definition, products=PRODUCTS, decide=_decide)
def head_ascent_gradient(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    has_bias: bool,
    name: str,
    auxiliary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``- sum_i w_i f(l_i) / sum_i w_i`` for the head, and that loss.

    Args:
        features: [B, d]. labels: [B]. weights: [B], positive. theta: [C, D] as ``[W, b]``.
        has_bias: whether there is a b.
        name, auxiliary: see :func:`imu_fast.ops.objective.objective`.

    Returns:
        gradient [C, D], and the loss as a scalar tensor (no host synchronisation).
    """
    features, share = features.to(theta.dtype), weights / -weights.sum()
    d = features.shape[1]
    logits = linear_logits(features, theta[:, :d], theta[:, d] if has_bias else None)
    if name == "ce":  # the residual comes with its loss
        # On a CPU without the dispatch and the checks of an operation within an operation.
        run = softmax_residual.body if logits.is_cpu else softmax_residual
        residual, losses = run(logits, labels, share)
        loss = losses.sum()
    else:
        loss = (share * objective(logits, labels, name, auxiliary)).sum()
        residual = objective_residual(logits, labels, name, auxiliary).mul_(share[:, None])
    gradient = torch.empty_like(theta)
    return add_gradients(gradient, residual, features, has_bias, beta=0.0, alpha=1.0), loss


def _kernel_limits(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, *_: Any, **__: Any
) -> str:
    exact = theta.dtype == torch.float32
    wide = "" if exact else f"theta is {theta.dtype}; the kernel updates float32"
    return kernel_dtypes(features) or wide


def _launch(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    has_bias: bool,
    name: str,
    *,
    precision: str,
    **rates: float,
) -> Tensor:
    from imu_fast.kernels import head_ascent as kernel

    logits, share = head_logits(features, theta, has_bias), weights / weights.sum()
    operands = (logits, features, labels, share, theta, buffer, has_bias, name)
    rates = {key: float(rate) for key, rate in rates.items()}
    return kernel.head_ascent(*operands, **rates, precision=precision)


def _by_definition(
    reference: ModuleType,
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    *rest: Any,
    **rates: float,
) -> Tensor:
    operands = (features, labels, weights, theta, buffer, *rest)
    new_theta, new_buffer, loss = reference.head_ascent(*operands, **rates)
    theta.copy_(new_theta)
    if buffer is not None:
        buffer.copy_(new_buffer)
    return loss.to(theta.dtype)


# A small share of a weighted residual keeps its bits: none of the step is rounded to bfloat16.
_KERNEL_HAS = ("ieee", "tf32x3", "tf32")


@operation(
    reference=_by_definition,
    kernel=_launch,
    limits=_kernel_limits,
    products=_KERNEL_HAS,
    decide=_decide,
)
def head_ascent(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    has_bias: bool,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
) -> Tensor:
    """One step of SGD on ``- sum_i w_i f(l_i) / sum_i w_i + alpha ||theta||_1``, in place.

    With g its gradient, ``buffer <- momentum buffer + g + weight_decay theta`` and
    ``theta <- theta - lr buffer``, as torch.optim.SGD does (no dampening, no Nesterov).

    Args:
        features: [B, d]; half precision is multiplied in theta's dtype. labels: [B].
        weights: [B], positive. theta: [C, D] as ``[W, b]``, adjacent columns; changed.
        buffer: [C, D], zeros before the first step, changed; None without momentum.
        has_bias: whether there is a b. name: one of ``LABEL_OBJECTIVES``.
        lr, momentum, weight_decay, alpha: as above, 0 or more.

    Returns:
        the loss before the step, as a scalar tensor (no host synchronisation).
    """
    # Without the dispatch and the checks of an operation within an operation.
    step, loss = head_ascent_gradient.body(features, labels, weights, theta, has_bias, name)
    if alpha:
        step.add_(theta.sign(), alpha=alpha)
        loss = loss + alpha * theta.abs().sum()
    if weight_decay:
        step.add_(theta, alpha=weight_decay)
    if buffer is not None:
        step = buffer.mul_(momentum).add_(step)
    theta.add_(step, alpha=-lr)
    return loss
