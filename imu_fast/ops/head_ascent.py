"""One reweighted ascent step at a softmax head on cached features, in closed form (SPEC 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast import backend
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.objective import objective, objective_residual


def head_logits(features: Tensor, theta: Tensor, has_bias: bool) -> Tensor:
    """``a~ @ theta.T`` without storing a~, in theta's dtype: [B, d] and [C, D] to [B, C]."""
    d, features = features.shape[1], features.to(theta.dtype)
    return torch.nn.functional.linear(features, theta[:, :d], theta[:, d] if has_bias else None)


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
        name, auxiliary: see :func:`imu_fast.ops.objective.objective`.

    Returns:
        gradient [C, D], and the loss as a scalar tensor (no host synchronisation).
    """
    which = backend.resolve("head_ascent_gradient", ("reference", "torch"), needs_kernel=False)
    features, share = features.to(theta.dtype), weights / weights.sum()
    logits = head_logits(features, theta, has_bias)
    if which == "reference":
        from imu_fast import reference

        t = theta.detach().requires_grad_()
        with torch.enable_grad():
            z = features @ t[:, : features.shape[1]].T
            z = z + t[:, -1] if has_bias else z
            loss = -(share * reference.objective(z, labels, name, auxiliary)).sum()
        return torch.autograd.grad(loss, t)[0], loss.detach()
    loss = -(share * objective(logits, labels, name, auxiliary)).sum()
    residual = objective_residual(logits, labels, name, auxiliary).mul_(-share[:, None])
    gradient = torch.empty_like(theta)
    return add_gradients(gradient, residual, features, has_bias, beta=0.0, alpha=1.0), loss


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
        name: one of ``LABEL_OBJECTIVES``.

    Returns:
        the loss before the step, as a scalar tensor (no host synchronisation).
    """
    limits = backend.kernel_limits(features)
    if theta.dtype != torch.float32:
        limits = limits or f"theta is {theta.dtype}; the kernel updates float32"
    which = backend.resolve("head_ascent", ("reference", "torch", "triton"), theta, limits)
    if which == "triton":
        from imu_fast.kernels import head_ascent as kernel

        logits, share = head_logits(features, theta, has_bias), weights / weights.sum()
        rates = float(lr), float(momentum), float(weight_decay), float(alpha)
        precision = backend.input_precision()
        return kernel.head_ascent(
            logits, features, labels, share, theta, buffer, has_bias, name, *rates, precision
        )
    if which == "reference":
        from imu_fast import reference

        rates = lr, momentum, weight_decay, alpha
        args = (features, labels, weights, theta, buffer, has_bias, name)
        new_theta, new_buffer, loss = reference.head_ascent(*args, *rates)
        theta.copy_(new_theta)
        if buffer is not None:
            buffer.copy_(new_buffer)
        return loss.to(theta.dtype)
    step, loss = head_ascent_gradient(features, labels, weights, theta, has_bias, name)
    if alpha:
        step.add_(theta.sign(), alpha=alpha)
        loss = loss + alpha * theta.abs().sum()
    if weight_decay:
        step.add_(theta, alpha=weight_decay)
    if buffer is not None:
        step = buffer.mul_(momentum).add_(step)
    theta.add_(step, alpha=-lr)
    return loss
