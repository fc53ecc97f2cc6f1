"""Every operation as a good user of PyTorch would write it: vectorised, no loops over samples.

Operands as in ``imu_fast/ops``, one token per sample; what is timed beside ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _augment(act: Tensor, has_bias: bool) -> Tensor:
    return torch.cat([act, torch.ones_like(act[:, :1])], dim=1) if has_bias else act


def mean_gradient(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    return delta.T @ _augment(act, has_bias) / (len(offsets) - 1)


def fisher_diagonal(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    return delta.square().T @ _augment(act, has_bias).square() / (len(offsets) - 1)


def bilinear_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> Tensor:
    return ((delta @ x) * _augment(act, has_bias)).sum(dim=1)


def quadratic_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> Tensor:
    return ((delta.square() @ x) * _augment(act, has_bias).square()).sum(dim=1)


def gradient_norms(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    return delta.square().sum(dim=1) * _augment(act, has_bias).square().sum(dim=1)


def gram(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    act = _augment(act, has_bias)
    return (delta @ delta.T) * (act @ act.T)


def cross_gram(left: tuple[Tensor, ...], right: tuple[Tensor, ...], has_bias: bool) -> Tensor:
    features = _augment(left[1], has_bias) @ _augment(right[1], has_bias).T
    return (left[0] @ right[0].T) * features


def ggn_product(
    p: Tensor, scale: Tensor, act: Tensor, v: Tensor, n: int, damping: float, has_bias: bool
) -> Tensor:
    act = _augment(act, has_bias)
    s = p * (act @ v.T)
    s = (s - p * s.sum(dim=1, keepdim=True)) * scale[:, None]
    return s.T @ act / n + damping * v


def softmax_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = logits if logits.dtype == torch.float64 else logits.float()
    delta = torch.softmax(z, dim=1)
    delta[torch.arange(len(z), device=z.device), labels] -= 1
    return delta, F.cross_entropy(z, labels, reduction="none")


def _logits(head: tuple[Any, ...], classes: slice = slice(None)) -> Tensor:
    """Half precision is multiplied in float32, as a user must where the sums are to be right."""
    features, weight, bias = head[0], head[1], head[2]
    wide = torch.promote_types(features.dtype, torch.float32)
    features, weight = features.to(wide), weight[classes].to(wide)
    return F.linear(features, weight, None if bias is None else bias[classes].to(wide))


def linear_softmax_normaliser(head: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    z, labels, scale = _logits(head), head[3], head[4]
    loss = F.cross_entropy(z, labels, reduction="none")
    return z.logsumexp(dim=1), 1 - torch.exp(-loss), loss if scale is None else loss * scale


def linear_softmax_residual(head: tuple[Any, ...], known: Any, classes: slice) -> Tensor:
    delta = torch.exp(_logits(head, classes) - known[0][:, None])
    local = head[3] - classes.start
    rows = torch.nonzero((local >= 0) & (local < delta.shape[1]))[:, 0]
    delta[rows, local[rows]] -= 1
    return delta if head[4] is None else delta * head[4][:, None]


def objective(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def objective_residual(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    return softmax_residual(logits, labels)[0]


def head_ascent_gradient(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, has_bias: bool, name: str
) -> tuple[Tensor, Tensor]:
    act, share = _augment(features.to(theta.dtype), has_bias), weights / weights.sum()
    delta, loss = softmax_residual(act @ theta.T, labels)
    return -(delta * share[:, None]).T @ act, -(share * loss).sum()


def head_ascent(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor,
    has_bias: bool,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
) -> Tensor:
    step, loss = head_ascent_gradient(features, labels, weights, theta, has_bias, name)
    loss = loss + alpha * theta.abs().sum()
    buffer.mul_(momentum).add_(step + alpha * theta.sign() + weight_decay * theta)
    theta.sub_(lr * buffer)
    return loss


def conjugate_gradient_iteration(state: tuple[Tensor, ...], mp: Tensor) -> tuple[Tensor, ...]:
    x, r, p, rho, size, goal, _ = state
    axes = tuple(range(1, x.dim()))
    curvature = (p * mp).sum(axes, keepdim=True)
    step = torch.where((curvature > 0) & (size > goal), rho / curvature, 0.0)
    x += step * p
    r -= step * mp
    size = (r * r).sum(axes, keepdim=True)
    moved = step != 0
    p.copy_(torch.where(moved, r + size / rho * p, p))
    return x, r, p, size, size, goal, step


def damped_cholesky_solve(a: Tensor, b: Tensor, damping: float) -> Tensor:
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    return torch.cholesky_solve(b, torch.linalg.cholesky(a + damping * eye))
