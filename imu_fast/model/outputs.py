"""What a model makes of a set of samples: logits, losses, correctness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.errors import InputError
from imu_fast.losses.cross_entropy import check_labels
from imu_fast.model.batches import as_batches, device_of, empty_message, split_batch, to_device
from imu_fast.model.guard import door, preserved
from imu_fast.model.logits import logits_of as logits_of
from imu_fast.model.reading import Reading, ReadingOptions


@dataclass(frozen=True)
class Measurement:
    """How a set of samples is classified: cross-entropy, correctness and p_y, each [n]."""

    loss: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.loss.mean())

    @property
    def accuracy(self) -> float:
        """Fraction classified as labelled."""
        return float(self.correct.double().mean())


def measure_logits(batches: Iterable[tuple[Tensor, Tensor]]) -> Measurement:
    losses, correct = [], []
    for logits, labels in batches:
        losses.append(nn.functional.cross_entropy(logits.float(), labels, reduction="none"))
        correct.append(logits.argmax(dim=1) == labels)
    loss = torch.cat(losses)
    return Measurement(loss, torch.cat(correct), torch.exp(-loss))


@dataclass(frozen=True)
class Outputs:
    """What a classifier said about n >= 1 samples.

    Attributes:
        logits: [n, C], float32 or float64; not finite where a model has diverged.
        labels: [n] int64 in [0, C), on the logits' device.

    Raises:
        InputError: the shapes do not fit, there is no sample, or a label is out of range.
    """

    logits: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.logits.dim() != 2 or self.labels.shape != self.logits.shape[:1]:
            raise InputError(
                f"logits have shape {tuple(self.logits.shape)} and labels "
                f"{tuple(self.labels.shape)}; pass [n, C] and [n]"
            )
        if len(self.labels) == 0:
            raise InputError("logits and labels are empty; pass at least one sample")
        if self.logits.dtype not in (torch.float32, torch.float64):
            raise InputError(f"logits have dtype {self.logits.dtype}; pass float32 or float64")
        check_labels(self.labels, self.logits.shape[1])
        ignored = int((self.labels < 0).sum())
        if ignored:
            raise InputError(f"{ignored} labels are ignore_index; remove these samples")

    @cached_property
    def loss(self) -> Tensor:
        """Cross-entropy of each sample in nats: [n]."""
        return nn.functional.cross_entropy(self.logits, self.labels, reduction="none")

    @cached_property
    def correct(self) -> Tensor:
        """Whether each sample is classified as labelled: [n] bool."""
        return self.logits.argmax(dim=1) == self.labels

    @cached_property
    def confidence(self) -> Tensor:
        """``p_y``, the probability of each sample's label: [n]."""
        return torch.exp(-self.loss)

    @cached_property
    def probabilities(self) -> Tensor:
        """``softmax(logits)``: [n, C]."""
        return torch.softmax(self.logits, dim=1)

    @cached_property
    def accuracy(self) -> float:
        """Fraction classified as labelled."""
        return float(self.correct.double().mean())

    @cached_property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.loss.mean())


@door
def outputs_of(model: nn.Module, loader: Any, **reading: Unpack[ReadingOptions]) -> Outputs:
    """Run a classifier in evaluation mode, and leave its modes as they were.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).
        reading: ``output``, where the logits are in what the model returns, and ``ignore_index``,
            as in :func:`imu_fast.capture_features`.

    Returns:
        Outputs on the model's device; half precision logits are widened to float32.

    Raises:
        InputError: the loader is empty, or a label is out of range.
    """
    how = Reading.of("outputs_of()", reading)
    all_logits, all_labels = [], []
    device = device_of(model)
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in as_batches(loader, model):
            args, kwargs, labels = to_device(split_batch(batch), device)
            logits = logits_of(model(*args, **kwargs), labels, how.output)
            all_logits.append(logits if logits.dtype == torch.float64 else logits.float())
            all_labels.append(how.labels_of_all(labels, logits, "outputs_of()"))
    if not all_logits:
        raise InputError(empty_message(loader))
    return Outputs(torch.cat(all_logits), torch.cat(all_labels))
