"""One reweighted ascent step at a softmax head on cached features, in closed form (SPEC 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast import backend
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.softmax_residual import softmax_residual

OBJECTIVES = ("ce", "margin", "log1mp")


def objective(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    """``f(l_i)``, what ascent increases: [B], differentiable. logits [B, C], labels [B].

    ``ce``: the cross-entropy, unbounded (the paper's). ``margin``: ``-max(0, z_y - max z_j)``, so
    only samples still predicted as their label push. ``log1mp``: ``log(1 - p_y)``.
    """
    if name == "ce":
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    label = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    if name == "margin":
        return -(label - others.amax(dim=1)).clamp_min(0)
    return others.logsumexp(dim=1) - logits.logsumexp(dim=1)


def objective_residual(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    """``d f / d z``: [B, C], the closed form of :func:`objective`'s gradient.

    ``ce``: ``p - onehot(y)``. ``margin``: ``-1`` on the label and ``+1`` on the runner-up where
    the label still wins. ``log1mp``: ``p_y (q - onehot(y))`` with q the softmax over the others.
    """
    column = labels[:, None]
    if name == "ce":
        return softmax_residual(logits, labels)[0]
    others = logits.scatter(1, column, -torch.inf)
    if name == "margin":
        best, runner_up = others.max(dim=1, keepdim=True)
        push = (logits.gather(1, column) >= best).to(logits.dtype)
        return torch.zeros_like(logits).scatter_(1, column, -push).scatter_(1, runner_up, push)
    label_p = torch.softmax(logits, dim=1).gather(1, column)
    return (torch.softmax(others, dim=1) * label_p).scatter_(1, column, -label_p)


def head_logits(features: Tensor, theta: Tensor, has_bias: bool) -> Tensor:
    """``a~ @ theta.T`` without storing a~: features [B, d], theta [C, D] to [B, C]."""
    d = features.shape[1]
    return torch.nn.functional.linear(features, theta[:, :d], theta[:, d] if has_bias else None)


def head_ascent_gradient(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, has_bias: bool, name: str
) -> tuple[Tensor, Tensor]:
    """Gradient of ``- sum_i w_i f(l_i) / sum_i w_i`` for the head, and that loss.

    Args:
        features: [B, d]. labels: [B]. weights: [B], positive. theta: [C, D] as ``[W, b]``.
        name: one of ``OBJECTIVES``.

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
            loss = -(share * reference.objective(z, labels, name)).sum()
        return torch.autograd.grad(loss, t)[0], loss.detach()
    loss = -(share * objective(logits, labels, name)).sum()
    residual = objective_residual(logits, labels, name).mul_(-share[:, None])
    gradient = torch.empty_like(theta)
    return add_gradients(gradient, residual, features, has_bias, beta=0.0, alpha=1.0), loss
