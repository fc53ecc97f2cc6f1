"""What a model makes of a set of samples: logits, losses, correctness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.errors import InputError, check_same_device, check_tensor
from imu_fast.losses.cross_entropy import check_labels
from imu_fast.model.batches import as_batches, device_of, empty_message, split_batch, to_device
from imu_fast.model.called import called, from_sample
from imu_fast.model.causal import settled
from imu_fast.model.guard import door, preserved
from imu_fast.model.independence import SampleChecks
from imu_fast.model.logits import candidates
from imu_fast.model.logits import logits_of as logits_of
from imu_fast.model.loss import labelled
from imu_fast.model.reading import Reading, ReadingOptions

# Logits that are widened and compared at once.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Measurement:
    """How a set of samples is predicted, each [n]; samples without a label are left out.

    Attributes:
        loss: the cross-entropy; of a sequence the mean over its tokens that have a label.
        correct: whether the likeliest class is the label; of a sequence for which fraction of
            these tokens.
        confidence: p_y, ``exp(-loss)``; of a sequence the geometric mean of its tokens'.
        tokens: how many labels, int64.
    """

    loss: Tensor
    correct: Tensor
    confidence: Tensor
    tokens: Tensor

    @property
    def mean_loss(self) -> float:
        """Mean of the samples' cross-entropies."""
        return float(self.loss.mean())

    @property
    def accuracy(self) -> float:
        """Fraction predicted as labelled, the mean over samples."""
        return float(self.correct.double().mean())

    @property
    def token_loss(self) -> float:
        """Mean over tokens, each alike: what transformers' models call their loss."""
        tokens = self.tokens.double()
        return float((self.loss.double() * tokens).sum() / tokens.sum())

    @classmethod
    def of(cls, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Measurement:
        """Of what :func:`row_sums` gives, batch by batch.

        Raises:
            InputError: no sample has a label.
        """
        loss, correct, tokens = (torch.cat(column) for column in zip(*rows, strict=True))
        if bool((kept := tokens > 0).all()) and bool((tokens == 1).all()):
            return cls(loss, correct, torch.exp(-loss), tokens)
        if not bool(kept.any()):
            raise InputError(
                f"none of {len(tokens)} samples has a label to be predicted; the first token of a "
                "sequence never is"
            )
        loss, correct, tokens = (
            loss[kept] / tokens[kept],
            correct[kept] / tokens[kept],
            tokens[kept],
        )
        return cls(loss, correct, torch.exp(-loss), tokens)


def is_correct(logits: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """Whether the likeliest class is the label: [N] bool; of NaN none is, and argmax says one."""
    return (logits.argmax(dim=1) == labels) & ~losses.isnan()


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N], float32 or float64, and correctness [N] of rows [N, C]."""
    losses, correct = [], []
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for z, y in zip(logits.split(step), labels.split(step), strict=True):
        z = z if z.dtype == torch.float64 else z.float()
        losses.append(nn.functional.cross_entropy(z, y, reduction="none"))
        correct.append(is_correct(z, y, losses[-1]))
    return torch.cat(losses), torch.cat(correct)


def row_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, correct tokens, and tokens, summed over each sample's rows: [n] each.

    Args:
        logits: [*targets.shape, C]. targets: -1 where there is no label.
    """
    valid = targets >= 0
    if targets.dim() == 1 and bool(valid.all()):
        return *row_losses(logits, targets), torch.ones_like(targets)
    counts = valid.reshape(len(valid), -1).sum(dim=1)
    return summed_rows(*row_losses(logits[valid], targets[valid]), counts)


def summed_rows(losses: Tensor, correct: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`row_sums` of packed rows [N]; counts [n]."""
    counts = counts.to(losses.device)
    if len(counts) == len(losses) and bool((counts == 1).all()):
        return losses, correct, counts
    owner = torch.repeat_interleave(torch.arange(len(counts), device=losses.device), counts)
    sums = losses.new_zeros(2, len(counts))
    sums[0].index_add_(0, owner, losses)
    sums[1].index_add_(0, owner, correct.to(losses.dtype))
    return sums[0], sums[1], counts


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
        check_tensor("logits", self.logits, "floating", "[n, C]")
        check_tensor("labels", self.labels, "integer", "[n]")
        if self.logits.requires_grad:
            object.__setattr__(self, "logits", self.logits.detach())
        if self.logits.dim() != 2 or self.labels.shape != self.logits.shape[:1]:
            raise InputError(
                f"logits have shape {tuple(self.logits.shape)} and labels "
                f"{tuple(self.labels.shape)}; pass [n, C] and [n]"
            )
        if len(self.labels) == 0:
            raise InputError("logits and labels are empty; pass at least one sample")
        if self.logits.dtype not in (torch.float32, torch.float64):
            raise InputError(f"logits have dtype {self.logits.dtype}; pass float32 or float64")
        check_same_device("logits", self.logits, "labels", self.labels)
        check_labels(self.labels, self.logits.shape[1])
        object.__setattr__(self, "labels", self.labels.to(torch.int64))
        ignored = int((self.labels < 0).sum())
        if ignored:
            raise InputError(f"{ignored} labels are ignore_index; remove these samples")

    @cached_property
    def loss(self) -> Tensor:
        """Cross-entropy of each sample in nats: [n]."""
        return nn.functional.cross_entropy(self.logits, self.labels, reduction="none")

    @cached_property
    def correct(self) -> Tensor:
        """Whether each sample is classified as labelled: [n] bool; of NaN logits none is."""
        return is_correct(self.logits, self.labels, self.loss)

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


def check_outputs(name: str, value: object) -> Outputs:
    """Return ``value``, or raise InputError unless it is :class:`Outputs`."""
    if isinstance(value, Outputs):
        return value
    raise InputError(
        f"{name} is a {type(value).__name__}; pass what outputs_of(model, data) returns, or "
        "Outputs(logits, labels), both of imu_fast.model.outputs"
    )


def logits_in_batches(
    model: nn.Module, loader: Any, reading: Reading, name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [..., C] and targets [...] of each batch, in evaluation mode; -1: no label.

    Args:
        name: of the door, for messages.
    """
    device = device_of(model)
    choice = reading.output

    def run(batch: Any) -> Any:
        return called(model, *batch)

    with preserved(model), torch.no_grad():
        model.eval()
        samples, places = 0, SampleChecks(model, alone=False)
        for batch in as_batches(loader, model):
            with from_sample(samples):
                parts = to_device(split_batch(batch), device)
                output = run(parts)
                logits = logits_of(output, parts.labels, choice)
                if logits.dim() > 2:
                    found = candidates(output, parts.labels) if choice is None else [choice]
                    where = next(iter(found))
                    places.look(run, parts, logits, where)
                    reading = settled(reading, model, run, parts, logits, where)
                targets = labelled(reading, parts.labels, logits, name)
            samples += parts.n
            yield logits, targets


@door
def measured(model: nn.Module, loader: Any, reading: Reading, name: str) -> Measurement:
    """How a model predicts samples of one label each, or the tokens of sequences.

    Raises:
        InputError: the loader is empty, a label is out of range, a classifier's sample has none, or
            the logits of a sample are NaN or +inf, of which no class is the likeliest.
    """
    rows = [row_sums(z, y) for z, y in logits_in_batches(model, loader, reading, name)]
    if not rows:
        raise InputError(empty_message(loader))
    found = Measurement.of(rows)
    undefined = found.loss.isnan()
    if bool(undefined.any()):
        first, count = int(undefined.nonzero()[0]), int(undefined.sum())
        raise InputError(
            f"logits are not finite at sample {first} ({count} of {len(undefined)} samples); "
            "remove these samples or repair the model (it may have diverged)"
        )
    return found


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
    how.of_classes("outputs_of()")
    all_logits, all_labels = [], []
    for logits, labels in logits_in_batches(model, loader, how, "outputs_of()"):
        how.check_one_label(logits, "outputs_of()")
        all_logits.append(logits if logits.dtype == torch.float64 else logits.float())
        all_labels.append(labels)
    if not all_logits:
        raise InputError(empty_message(loader))
    return Outputs(torch.cat(all_logits), torch.cat(all_labels))
