"""The loss of each sample, and its signal at the logits: the one place that knows the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.losses.base import Loss
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.model.labels import class_labels
from imu_fast.model.reading import Reading
from imu_fast.ops.softmax_residual import softmax_residual
from imu_fast.ops.tokens import sum_over_tokens


def targets_of(labels: Tensor, logits: Tensor, loss: Loss) -> Tensor:
    """What each row of the logits is to be: int64 in [0, C), -1 where it has no loss.

    Args:
        labels: [n] or [n, T]. logits: [*labels.shape, C].
        loss: under its ``shift`` position t predicts the label at t + 1; the last predicts none.

    Raises:
        InputError: the shapes do not fit, or a label is out of range.
    """
    assert isinstance(loss, CrossEntropy)
    labels = class_labels(labels, logits.shape)
    loss.check_labels(labels, logits.shape[-1])
    targets = labels.to(logits.device, torch.int64)
    targets = targets.masked_fill(~loss.valid(targets.flatten()).view_as(targets), -1)
    if loss.shift is True and targets.dim() == 2:
        targets = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=-1)
    return targets


def labelled(reading: Reading, labels: Tensor, logits: Tensor, door: str) -> Tensor:
    """:func:`targets_of`, where samples of one label each must have it.

    Raises:
        InputError: as there, or a sample of a classifier has no label.
    """
    if logits.dim() == 2:
        return reading.labels_of_all(labels, logits, door)
    return targets_of(labels, logits, reading.loss)


def counts_of(targets: Tensor) -> Tensor:
    """How many rows with a loss each sample has: [n] int64 on the CPU."""
    return (targets >= 0).reshape(len(targets), -1).sum(dim=1).cpu()


def sample_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of each sample over its rows, and the signal of their sum.

    Args:
        logits: [*targets.shape, C]. targets: as :func:`targets_of` gives them.

    Returns:
        losses [n], and delta [N, C] of the N rows that have a loss, in their order; float64 for
        float64 logits, otherwise float32.
    """
    valid = targets >= 0
    rows, of_rows = logits.detach(), targets
    if bool(valid.all()):
        rows, of_rows = rows.flatten(0, -2), of_rows.flatten()
        if targets.dim() == 1:
            delta, losses = softmax_residual(rows, of_rows)
            return losses, delta
    else:
        rows, of_rows = rows[valid], of_rows[valid]
    counts, scale = counts_of(targets), None
    if targets.dim() > 1:
        per_row = torch.repeat_interleave(1.0 / counts.clamp_min(1).double(), counts)
        scale = per_row.to(logits.device, torch.float32)
        if logits.dtype == torch.float64:
            scale = per_row.to(logits.device)
    delta, losses = softmax_residual(rows, of_rows, scale)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return sum_over_tokens(losses, offsets), delta


def on_logits(delta: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """The signal delta [N, C] of the rows that have a loss, at all rows; in the logits' dtype."""
    if delta.shape[:-1].numel() == targets.numel():
        return delta.to(logits.dtype).view(logits.shape)
    out = torch.zeros_like(logits)
    out[targets >= 0] = delta.to(logits.dtype)
    return out
