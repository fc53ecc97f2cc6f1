"""One reweighted ascent step at a softmax head on cached features, in closed form (SPEC 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast import backend
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.objective import objective, objective_residual


def head_logits(features: Tensor, theta: Tensor, has_bias: bool) -> Tensor:
    """``a~ @ theta.T`` without storing a~: features [B, d], theta [C, D] to [B, C]."""
    d = features.shape[1]
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
    which = backend.resolve("head_ascent", ("reference", "torch"))
    logits = head_logits(features, theta, has_bias)
    share = weights / weights.sum()
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
