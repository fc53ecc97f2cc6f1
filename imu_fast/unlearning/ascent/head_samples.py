"""The head's gradient where a sample is more than one row, or more than the forget set counts.

A sample's f is a function of the mean of its tokens' formula, so that its gradient is the formula's
residual at each token times ``f' / T``: products of residuals and cached features again, some
tokens at a time, and no autograd through the head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imu_fast.ops.head_ascent import head_logits
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.objective import objective, objective_residual
from imu_fast.ops.softmax_residual import softmax_residual
from imu_fast.ops.tokens import sum_over_tokens, tokens_of_samples
from imu_fast.unlearning.ascent.retain import RETAIN, Retain
from imu_fast.unlearning.ascent.step import Rule
from imu_fast.unlearning.subject import HeadSubject

# Logits that are made at once.
_CHUNK_ELEMENTS = 1 << 24


def shares(weights: Tensor, tokens: Tensor) -> Tensor:
    """``w_i / sum w``, among the samples that have tokens: [B]."""
    held = weights * (tokens > 0).to(weights.device)
    return held / held.sum().clamp_min(torch.finfo(held.dtype).tiny)


def of_samples(
    subject: HeadSubject, rule: Rule, rows: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient [C, D] of ``- sum_i w_i f_i / sum_i w_i`` over samples ``rows``, and that loss."""
    theta, goal = subject.theta, rule.objective
    features, labels = subject.sets[rule.samples]
    places, tokens = tokens_of_samples(subject.offsets[rule.samples], rows)
    of_token = of_sample = None
    if rule.auxiliary is not None:
        found = rule.auxiliary.of(rows).to(theta.device)
        of_token, of_sample = (found, None) if goal.of_tokens else (None, found)

    def parts() -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        for part in _chunks(len(places), len(theta)):
            at = places[part]
            z = head_logits(features[at], theta, subject.has_bias)
            yield part, z, labels[at], None if of_token is None else of_token[part]

    values = theta.new_empty(len(places))
    for part, z, y, known in parts():
        values[part] = objective(z, y, goal.rows, known)
    offsets = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
    count = tokens.clamp_min(1).to(theta)
    mean = (sum_over_tokens(values, offsets) / count).requires_grad_()
    with torch.enable_grad():
        f = goal.of_samples(mean, tokens.to(theta), of_sample)
    (slope,) = torch.autograd.grad(f.sum(), mean)
    share = shares(weights.to(theta), tokens)
    of_rows = torch.repeat_interleave(-share * slope / count, tokens)
    gradient = torch.zeros_like(theta)
    for part, z, y, known in parts():
        residual = objective_residual(z, y, goal.rows, known).mul_(of_rows[part, None])
        act = features[places[part]].to(theta.dtype)
        add_gradients(gradient, residual, act, subject.has_bias, beta=1.0, alpha=1.0)
    return gradient, -(share * f.detach()).sum()


def add_retained(gradient: Tensor, subject: HeadSubject, retain: Retain, size: int) -> Tensor:
    """Add the gradient of the retain term to [C, D], and return the term; ``size`` samples."""
    theta = subject.theta
    features, labels = subject.sets[RETAIN]
    offsets = subject.offsets[RETAIN]
    rows = drawn(len(offsets) - 1, size).to(theta.device)
    places, tokens = tokens_of_samples(offsets, rows)
    share = shares(theta.new_ones(len(rows)), tokens)
    scale = torch.repeat_interleave(share * retain.retain_weight / tokens.clamp_min(1), tokens)
    signal = _cross_entropy if retain.retain_loss == "ce" else _divergence
    original, total = subject.trained.to(theta.dtype), theta.new_zeros(())
    for part in _chunks(len(places), len(theta)):
        act = features[places[part]].to(theta.dtype)
        z = head_logits(act, theta, subject.has_bias)
        z_was = head_logits(act, original, subject.has_bias)
        residual, losses = signal(z, z_was, labels[places[part]])
        total += (losses * scale[part]).sum()
        residual = residual.mul_(scale[part, None])
        add_gradients(gradient, residual, act, subject.has_bias, beta=1.0, alpha=1.0)
    return total


def drawn(n: int, size: int) -> Tensor:
    """Samples of the retain set for one step, by the generator that a run seeds each epoch."""
    return torch.randint(n, (size,))


def _cross_entropy(z: Tensor, z_was: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_residual(z, labels)


def _divergence(z: Tensor, z_was: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(p_was || p)`` and its signal ``p - p_was``."""
    log_p, log_was = z.log_softmax(dim=1), z_was.log_softmax(dim=1)
    was = log_was.exp()
    return log_p.exp() - was, (was * (log_was - log_p)).sum(dim=1)


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // classes)
    return (slice(start, start + step) for start in range(0, rows, step))
