"""The loss of each sample, and its signal at the logits: the one place that knows the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.losses.auto import AutoLoss
from imu_fast.losses.base import Loss, Signal, mean_scale
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.model.labels import check_classes, class_labels
from imu_fast.model.reading import Reading
from imu_fast.ops.tokens import sum_over_tokens


@dataclass(frozen=True)
class Targets:
    """What the rows of the logits of n samples are to be.

    Attributes:
        labels: [N] int64, or [N, C]: of the rows that have a loss, in their order.
        valid: [n] or [n, T], bool: which they are.
        loss: of one such row.
    """

    labels: Tensor
    valid: Tensor
    loss: Loss

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def shape(self) -> torch.Size:
        """Of the rows."""
        return self.valid.shape

    @classmethod
    def of_classes(cls, targets: Tensor) -> Targets:
        """Of what :func:`class_targets` gives."""
        valid = targets >= 0
        return cls(targets[valid], valid, of_rows(CrossEntropy()))

    @property
    def counts(self) -> Tensor:
        """How many rows with a loss each sample has: [n] int64 on the CPU."""
        return self.valid.reshape(len(self), -1).sum(dim=1).cpu()


def joined_labels(batches: Sequence[Tensor]) -> Tensor:
    """Labels of several batches of one loss: [N], or [N, C].

    Where some have class indices and others probabilities, as mixing samples now and then gives
    them, an index stands for its one-hot row.
    """
    rows = next((labels for labels in batches if labels.dim() > 1), None)
    if rows is None:
        return torch.cat(list(batches))
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.cat([eye[labels] if labels.dim() == 1 else labels for labels in batches])


class NoLabelsError(InputError):
    """No sample of these has a label that a loss is of."""


def check_labelled(labelled: int, samples: int, loss: Loss) -> None:
    """Raise NoLabelsError where no label of all these samples has a loss."""
    if labelled == 0:
        ignored = getattr(loss, "ignore_index", None)
        which = "" if ignored is None else f" (labels of ignore_index={ignored} are left out)"
        raise NoLabelsError(
            f"none of {samples} samples has a label to be predicted{which}; pass their labels, or "
            "another ignore_index="
        )


def of_rows(loss: Loss) -> Loss:
    """The loss of rows that are lined up with their labels already."""
    return replace(loss, shift=False) if isinstance(loss, CrossEntropy) else loss


def targets_of(labels: Tensor, logits: Tensor, loss: Loss) -> Targets:
    """The labels of each row of the logits.

    Args:
        labels: [n] or [n, T]; of losses with a label per output [n, C] or [n, T, C].
        logits: [n, C] or [n, T, C].
        loss: under its ``shift`` position t predicts the label at t + 1; the last predicts none.

    Raises:
        InputError: the shapes do not fit, or a label is one that the loss does not take.
    """
    classes, labels = logits.shape[-1], labels.to(logits.device)
    if isinstance(loss, AutoLoss):
        loss = loss.of(labels, logits.shape)
    soft = labels.is_floating_point() and labels.shape == logits.shape
    if isinstance(loss, CrossEntropy) and soft:
        check_classes(logits.shape)
    if isinstance(loss, CrossEntropy) and not soft:
        found = class_labels(labels, logits.shape)
    else:
        found = labels
        if labels.shape != logits.shape:
            wanted = [tuple(logits.shape)] + [tuple(logits.shape[:-1])] * (classes == 1)
            if tuple(labels.shape) not in wanted:
                raise InputError(
                    f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}; "
                    f"{loss.name} takes labels of shape {' or '.join(map(str, wanted))}"
                )
            found = labels.unsqueeze(-1)
    rows = logits.shape[:-1]
    prepared = loss.prepared(found.reshape(rows.numel(), *found.shape[len(rows) :]), classes)
    valid = loss.valid(prepared).view(rows)
    prepared = prepared.view(*rows, *prepared.shape[1:])
    if isinstance(loss, CrossEntropy) and loss.shift is True:
        if valid.dim() != 2:
            raise InputError(
                f"shift=True is for logits [n, T, C], of which position t predicts the label at "
                f"t + 1; they have shape {tuple(logits.shape)}: leave it out"
            )
        valid = torch.nn.functional.pad(valid[:, 1:], (0, 1), value=False)
        prepared = prepared.roll(-1, dims=1)
    kept = prepared.flatten(0, len(rows) - 1) if bool(valid.all()) else prepared[valid]
    return Targets(kept, valid, of_rows(loss))


def sample_losses(logits: Tensor, targets: Targets) -> Signal:
    """The mean loss of each sample over its rows, and the signal of their sum.

    Args:
        logits: [*targets.shape, C].

    Returns:
        delta [N, C] of the N rows that have a loss, in their order, and losses of the samples [n];
        float64 for float64 logits, otherwise float32. And what the loss keeps of those rows.
    """
    rows, scale = logits.detach(), None
    rows = rows.flatten(0, -2)
    if not bool(targets.valid.all()):
        rows = rows.index_select(0, torch.nonzero(targets.valid.flatten()).flatten())
    counts = targets.counts
    if targets.valid.dim() > 1:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        scale = mean_scale(counts).to(logits.device, wide)
    found = targets.loss.residual(rows, targets.labels, scale)
    if scale is None and len(rows) == len(targets):
        return found
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return found._replace(losses=sum_over_tokens(found.losses, offsets))


def on_logits(delta: Tensor, logits: Tensor, targets: Targets) -> Tensor:
    """The signal delta [N, C] of the rows that have a loss, at all rows; in the logits' dtype."""
    if delta.shape[:-1].numel() == targets.valid.numel():
        return delta.to(logits.dtype).view(logits.shape)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    valid, rows = targets.valid.flatten(), out.flatten(0, -2)
    rows.index_copy_(0, torch.nonzero(valid).flatten(), delta.to(logits.dtype))
    rows.index_fill_(0, torch.nonzero(~valid).flatten(), 0)
    return out


def class_targets(labels: Tensor, logits: Tensor, loss: Loss) -> Tensor:
    """What each row of the logits is to be: int64 in [0, C), -1 where it has no loss.

    As :func:`targets_of`, for a cross-entropy of class indices.
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
    """:func:`class_targets`, where samples of one label each must have it.

    Raises:
        InputError: as there, or a sample of a classifier has no label.
    """
    if logits.dim() == 2:
        return reading.labels_of_all(labels, logits, door)
    return class_targets(labels, logits, reading.of_tokens(door))


def counts_of(targets: Tensor) -> Tensor:
    """How many rows of :func:`class_targets` have a loss, of each sample: [n] int64 on the CPU."""
    return (targets >= 0).reshape(len(targets), -1).sum(dim=1).cpu()
