"""The loss that a transformers model says it was trained with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_flag
from imu_fast.losses.base import Loss, Signal
from imu_fast.losses.binary_cross_entropy import BinaryCrossEntropy
from imu_fast.losses.cross_entropy import IGNORE_INDEX, CrossEntropy, check_index, check_shift
from imu_fast.losses.squared_error import SquaredError
from imu_fast.options import option, options

_KINDS = ("single_label_classification", "multi_label_classification", "regression")


def _check_problem(name: str, value: Any) -> None:
    if value not in (None, *_KINDS):
        raise InputError(f"{name}={value!r} is unknown; it is one of {', '.join(_KINDS)}")


@options
class AutoLoss(Loss):
    """What ``config.problem_type`` of a transformers model says, with that library's reductions.

    ``single_label_classification``: cross-entropy. ``multi_label_classification``: binary
    cross-entropy, its mean over the outputs. ``regression``: the squared error, its mean. Where the
    config leaves it open, as transformers decides: one output is regression, integer labels are
    classes, others are many labels at once.

    Attributes:
        problem_type: that of the model, which is filled in; without one labels must be integers,
            unless ``by_labels``: then they decide, as in transformers.
        ignore_index, shift: of cross-entropy.
    """

    name = "auto"
    ignore_index: int = option(default=IGNORE_INDEX, check=check_index)
    shift: bool | Literal["auto"] = option(default="auto", check=check_shift, also="shift_labels")
    problem_type: str | None = option(default=None, check=_check_problem)
    by_labels: bool = option(default=False, check=check_flag)

    def of(self, labels: Tensor, shape: torch.Size) -> Loss:
        """The loss of these labels and logits of this shape.

        Raises:
            InputError: nothing says what these labels are.
        """
        kind = self.problem_type
        if kind is None and self.by_labels:
            kind = "multi_label_classification" if labels.is_floating_point() else None
        if kind is None and labels.is_floating_point():
            raise InputError(
                f"loss='auto' follows config.problem_type of a transformers model; this one has "
                f"none, and labels have dtype {labels.dtype} and shape {tuple(labels.shape)} for "
                f"logits {tuple(shape)}; name the loss: 'cross_entropy', 'binary_cross_entropy' "
                "or 'squared_error'"
            )
        if kind in ("multi_label_classification", "regression") and self.shift is True:
            raise InputError(f"shift=True is for labels that are classes; loss='auto' is {kind}")
        if kind == "regression" and self.ignore_index != IGNORE_INDEX:
            raise InputError(
                f"ignore_index={self.ignore_index}: loss='auto' is regression, where every label "
                "is a number; leave samples without one out"
            )
        if kind == "multi_label_classification":
            return BinaryCrossEntropy(reduction="mean", ignore_index=self.ignore_index)
        if kind == "regression":
            return SquaredError(reduction="mean")
        return CrossEntropy(ignore_index=self.ignore_index, shift=self.shift)

    def prepared(self, labels: Tensor, num_classes: int) -> Tensor:
        """Refused: there is no model here."""
        raise InputError(
            "loss='auto' follows a model, and there is none here; name the loss: 'cross_entropy', "
            "'binary_cross_entropy' or 'squared_error'"
        )

    def valid(self, labels: Tensor) -> Tensor:
        """Refused, as :meth:`prepared`."""
        return self.prepared(labels, 0)

    def residual(self, outputs: Tensor, labels: Tensor, scale: Tensor | None) -> Signal:
        """Refused, as :meth:`prepared`."""
        raise InputError(f"loss={self!r} follows a model, and there is none here")
