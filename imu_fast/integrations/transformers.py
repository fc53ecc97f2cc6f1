"""transformers: a Trainer that forgets, the mix-in for your own, and a callback that stops it.

In a loop of your own, ``imu.batch_weights(model, batch)`` gives the weights in one line, and
``imu.InfluenceWeightedLoss`` is a loss module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from imu_fast import distributed
from imu_fast.errors import InputError, check_count, check_positive
from imu_fast.integrations._forgetting import (
    Forgetting,
    UnlearningMixin,
    accepted,
    as_inputs,
    labelled,
    means,
    predicts_next,
)
from imu_fast.model.batches import device_of, split_batch
from imu_fast.model.called import called
from imu_fast.model.guard import Kept, copies_of, preserved, put_back
from imu_fast.model.logits import logits_of
from imu_fast.ops.objective import objective

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise InputError(
        f"imu_fast.integrations.transformers needs transformers, which does not load ({error}); "
        "pip install transformers"
    ) from error

__all__ = ["Forgetting", "StopAtDepth", "UnlearningMixin", "UnlearningTrainer", "forget_depth"]
logger = logging.getLogger("imu_fast")


class UnlearningTrainer(UnlearningMixin, Trainer):
    """``transformers.Trainer`` whose training forgets; see :class:`UnlearningMixin`."""


def forget_depth(
    model: nn.Module, batches: Any, *, shift_labels: bool | None = None
) -> tuple[float, float]:
    """Mean loss and accuracy over the samples, each the mean over its tokens, in evaluation mode.

    Args:
        batches: an iterable of dicts with labels, or of ``(input_ids, labels, attention_mask)``.
        shift_labels: None: where the model's own loss of the first batch says so.

    Raises:
        InputError: there is no sample with a label, or labels are no class indices.
    """
    return _means([_sums(model, batches, shift_labels)])


def _sums(model: nn.Module, batches: Any, shift: bool | None) -> tuple[float, float, int]:
    """Of the samples' losses and accuracies, and how many samples have a label."""
    device, losses, right, n = device_of(model), 0.0, 0.0, 0
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in batches:
            given = accepted(model, as_inputs(batch))
            given = {k: v.to(device) if hasattr(v, "to") else v for k, v in given.items()}
            if "labels" not in given:
                raise InputError(f"a batch has {list(given)} and no labels")
            if shift is None:
                shift = predicts_next(model, given)
            labels = given["labels"]
            outputs = called(model, *split_batch(given, model))
            z, y, counts = labelled(logits_of(outputs, labels), labels, shift)
            losses += float(means(objective(z, y, "ce"), counts).sum())
            right += float(means((z.argmax(dim=1) == y).to(z.dtype), counts).sum())
            n += int((counts > 0).sum())
    return losses, right, n


def _means(sums: list[tuple[float, float, int]]) -> tuple[float, float]:
    losses, right, n = (sum(column) for column in zip(*sums, strict=True))
    if not n:
        raise InputError("batches has no sample with a label")
    return losses / n, right / n


class StopAtDepth(TrainerCallback):
    """Stops a Trainer once the forget set is forgotten so far.

    A Trainer looks whether to stop after a batch: where the depth is reached before the first, what
    that one has changed in the model is put back.

    Args:
        batches: of the forget set, read at each measurement; see :func:`forget_depth`. Where a
            training has several processes, the depth is that of the samples of all: they may have
            the same ones, or each its own part.
        forget_loss: stop at or above this mean loss. forget_accuracy: at or below this accuracy.
        every: steps between measurements.
        shift_labels: as of :func:`forget_depth`.

    Attributes:
        records: ``(step, loss, accuracy)`` of each measurement. reached: whether it was.

    Raises:
        InputError: neither depth is given, or batches that can be read once.
    """

    def __init__(
        self,
        batches: Any,
        *,
        forget_loss: float | None = None,
        forget_accuracy: float | None = None,
        every: int = 1,
        shift_labels: bool | None = None,
    ) -> None:
        if forget_loss is None and forget_accuracy is None:
            raise InputError("StopAtDepth has no depth; set forget_loss or forget_accuracy")
        for name, value in (("forget_loss", forget_loss), ("forget_accuracy", forget_accuracy)):
            if value is not None:
                check_positive(name, value, allow_zero=True)
        if isinstance(batches, Iterator):
            raise InputError(
                f"batches is a {type(batches).__name__}, which can be read once, and is read at "
                "each measurement; pass a list or a DataLoader"
            )
        self.batches, self.shift_labels = batches, shift_labels
        self.forget_loss, self.forget_accuracy = forget_loss, forget_accuracy
        self.every = check_count("every", every)
        self.records: list[tuple[int, float, float]] = []
        self.reached = False
        self._before: Kept = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure once before the first step."""
        self.records, self.reached, self._before = [], False, []
        model = kwargs["model"]
        self._measure(state, control, model)
        if self.reached:
            _, loss, accuracy = self.records[-1]
            logger.warning(
                "the forget set is as deep as was asked for before any step (loss %.4f, accuracy "
                "%.4f): the model stays as it is",
                loss,
                accuracy,
            )
            trained = [p for p in model.parameters() if p.requires_grad]
            self._before = copies_of([*trained, *model.buffers()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and ask the Trainer to stop."""
        if self._before:
            self._stay(control)
        elif state.global_step % self.every == 0:
            self._measure(state, control, kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where gradients accumulate, this is where a Trainer stops first."""
        if self._before:
            self._stay(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where the budget ended first; the last state is measured if it was not."""
        if not self.reached and self.records[-1][0] != state.global_step:
            self._measure(state, control, kwargs["model"])
        if not self.reached:
            _, loss, accuracy = self.records[-1]
            logger.warning(
                "training ended before the depth that was asked for: loss %.4f, accuracy %.4f",
                loss,
                accuracy,
            )

    def _stay(self, control: Any) -> None:
        put_back(self._before)
        self._before, control.should_training_stop = [], True

    def _depth(self, model: nn.Module) -> tuple[float, float]:
        """Of the samples of all processes of the training, so that they stop together or not."""
        if not distributed.several():
            return forget_depth(model, self.batches, shift_labels=self.shift_labels)
        with distributed.together("StopAtDepth"):
            own = _sums(model, self.batches, self.shift_labels)
            return _means(distributed.gather(own))

    def _measure(self, state: Any, control: Any, model: nn.Module) -> None:
        loss, accuracy = self._depth(model)
        self.records.append((state.global_step, loss, accuracy))
        deep = self.forget_loss is not None and loss >= self.forget_loss
        wrong = self.forget_accuracy is not None and accuracy <= self.forget_accuracy
        if deep or wrong:
            self.reached = control.should_training_stop = True
