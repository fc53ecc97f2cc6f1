"""Cross-entropy of softmax outputs: hard or soft labels, smoothed, with class weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.losses.base import Loss, Signal, compute_dtype, numbers
from imu_fast.losses.output_curvature import LabelSoftmax, Softmax, complement
from imu_fast.ops.softmax_residual import softmax_residual
from imu_fast.options import option, options

IGNORE_INDEX = -100


def check_labels(labels: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise InputError naming the first label outside [0, num_classes) and not ignore_index."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels have dtype {labels.dtype}; pass integer class indices")
    given, labels = labels, labels.to(torch.int64)
    if given.dtype == torch.uint64 and bool((wrapped := labels < 0).any()):
        first = int(torch.nonzero(wrapped.flatten())[0])
        raise InputError(f"labels[{first}] is 2^63 or more; the head has {num_classes} classes")
    if labels.numel() and 0 <= int(labels.min()) and int(labels.max()) < num_classes:
        return
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(bad.any()):
        first = int(torch.nonzero(bad.flatten())[0])
        raise InputError(
            f"labels[{first}]={int(labels.flatten()[first])} is outside [0, {num_classes}) and is "
            f"not ignore_index={ignore_index}; the head has {num_classes} classes"
        )


def check_shift(name: str, value: Any) -> None:
    if value != "auto" and not isinstance(value, bool):
        raise InputError(f"{name}={value!r} must be True, False or 'auto'")


def check_index(name: str, value: Any) -> None:
    """Raise InputError unless value is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}={value!r} must be an integer, such as {IGNORE_INDEX}")


def _check_smoothing(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"{name}={value!r} must be in [0, 1]")


@options
class CrossEntropy(Loss):
    """``- sum_c w_c y_c log softmax(z)_c``.

    Labels are class indices, whose y is one-hot, or probabilities y themselves, which sum to one
    (a row of zeros has no loss). Class weights and smoothing are torch's for one sample, as with
    ``reduction="sum"``: torch's mean over a batch of class indices also divides by the sum of
    their weights, which is no property of a sample, and is not done here.

    Attributes:
        ignore_index: tokens with this label have no loss, and no gradient.
        shift: logits [B, T, C] at position t predict the label at t + 1 (causal language models
            whose data set has not shifted them already); where a model is captured. ``"auto"``: as
            the model's own loss does it, said through the log.
        label_smoothing: e in [0, 1]; y becomes ``(1 - e) y + e / C``.
        class_weights: w, C numbers that are not negative; None: 1.
    """

    name = "cross_entropy"
    ignore_index: int = option(default=IGNORE_INDEX, check=check_index)
    shift: bool | Literal["auto"] = option(default="auto", check=check_shift, also="shift_labels")
    label_smoothing: float = option(default=0.0, check=_check_smoothing)
    class_weights: tuple[float, ...] | None = option(default=None, check=numbers)

    @property
    def plain(self) -> bool:
        """Neither smoothed nor weighted."""
        return not self.label_smoothing and self.class_weights is None

    def check(self) -> None:
        """Class weights become a tuple, whatever they were given as."""
        object.__setattr__(self, "class_weights", numbers("class_weights", self.class_weights))

    def aligned(self, per_position: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs together of [B, T, ...] and labels [B, T]; [B] have no positions."""
        if self.shift is True and labels.dim() == 2:
            return per_position[:, :-1], labels[:, 1:]
        return per_position, labels

    def check_labels(self, labels: Tensor, num_classes: int) -> None:
        """Integers in [0, C), or ``ignore_index``."""
        check_labels(labels, num_classes, self.ignore_index)

    def check_classes(self, num_classes: int) -> None:
        """Raise InputError unless there is a weight for each class."""
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise InputError(
                f"class_weights has {len(self.class_weights)} numbers; the head has {num_classes} "
                "classes"
            )

    def prepared(self, labels: Tensor, num_classes: int) -> Tensor:
        """Integers [N] as int64, or probabilities [N, C] as they are (at least float32)."""
        self.check_classes(num_classes)
        if labels.is_floating_point() and tuple(labels.shape[1:]) == (num_classes,):
            soft = labels if labels.dtype == torch.float64 else labels.float()
            total = soft.sum(dim=1)
            off = ((total - 1).abs() > 1e-2) & (soft != 0).any(dim=1)
            bad = (soft < 0).any(dim=1) | off | ~torch.isfinite(total)
            if bool(bad.any()):
                raise InputError(
                    f"labels[{int(torch.nonzero(bad)[0])}] is no row of probabilities, which are "
                    "not negative and sum to one"
                )
            return soft
        if labels.dim() != 1:
            raise InputError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass class "
                f"indices [N], or probabilities [N, {num_classes}] in floating point"
            )
        self.check_labels(labels, num_classes)
        return labels.to(torch.int64)

    def valid(self, labels: Tensor) -> Tensor:
        """Those that are not ``ignore_index``, or whose probabilities are not all zero."""
        return (labels != 0).any(dim=1) if labels.dim() == 2 else labels != self.ignore_index

    def residual(self, outputs: Tensor, labels: Tensor, scale: Tensor | None) -> Signal:
        """``delta = c (s p - w y)`` with ``s = sum_c w_c y_c``, and ``- c sum_c w_c y_c log p_c``.

        For hard labels ``delta = c w_y (p - onehot)``, and p of the label alone is kept beside it.
        """
        dtype, w = compute_dtype(outputs), None
        if self.class_weights is not None:
            w = torch.tensor(self.class_weights, dtype=dtype, device=outputs.device)
        scale = None if scale is None else scale.to(dtype)
        if labels.dim() == 2 or self.label_smoothing:
            return self._soft(outputs.to(dtype), labels, scale, w)
        size = None if w is None else w[labels]
        weight = size if scale is None else scale if size is None else scale * size
        delta, losses = softmax_residual(outputs, labels, weight)
        log_p = losses if weight is None else losses / weight.where(weight > 0, 1.0)
        return Signal(delta, losses, LabelSoftmax(torch.exp(-log_p), size))

    def _soft(
        self, outputs: Tensor, labels: Tensor, scale: Tensor | None, w: Tensor | None
    ) -> Signal:
        classes = outputs.shape[1]
        if labels.dim() == 2:
            y = labels.to(outputs)
        else:
            y = torch.zeros_like(outputs).scatter_(1, labels[:, None], 1.0)
        if self.label_smoothing:
            y = y * (1 - self.label_smoothing) + self.label_smoothing / classes
        y = y if w is None else y * w
        p = torch.softmax(outputs, dim=1)
        rest, total = complement(p), y.sum(dim=1)
        # s p - w y = p (s - w y) - w y (1 - p), each bracket by the sum of its parts.
        delta = p * complement(y) - y * rest
        log_p = torch.where(rest < 0.5, torch.log1p(-rest), torch.log_softmax(outputs, dim=1))
        losses = -(y * log_p.where(y > 0, 0.0)).sum(dim=1)
        if scale is not None:
            delta, losses, total = delta * scale[:, None], losses * scale, total * scale
        return Signal(delta, losses, Softmax(p, total))

    def recovered(self, delta: Tensor, labels: Tensor) -> LabelSoftmax:
        """p of a hard label as ``1 + delta``, which has the absolute rounding of one."""
        if labels.dim() == 2 or not self.plain:
            super().recovered(delta, labels)
        labels = self.prepared(labels, delta.shape[1])  # of factors that a user made
        if not bool(self.valid(labels).all()):
            raise InputError(f"labels holds ignore_index={self.ignore_index}; leave these rows out")
        return LabelSoftmax((1 + delta.gather(1, labels[:, None])[:, 0]).clamp_min(0))
