"""Cross-entropy of softmax outputs and hard labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.losses.base import Loss, OutputCurvature
from imu_fast.ops.softmax_residual import softmax_residual
from imu_fast.options import option, options

IGNORE_INDEX = -100
# Elements of p that are converted at once: large enough for products at full speed.
_CHUNK_ELEMENTS = 1 << 18


def check_labels(labels: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise InputError naming the first label outside [0, num_classes) and not ignore_index."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels have dtype {labels.dtype}; pass integer class indices")
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(bad.any()):
        first = int(torch.nonzero(bad.flatten())[0])
        raise InputError(
            f"labels[{first}]={int(labels.flatten()[first])} is outside [0, {num_classes}) and is "
            f"not ignore_index={ignore_index}; the head has {num_classes} classes"
        )


def _check_shift(name: str, value: Any) -> None:
    if value != "auto" and not isinstance(value, bool):
        raise InputError(f"{name}={value!r} must be True, False or 'auto'")


def _check_index(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}={value!r} must be an integer, such as {IGNORE_INDEX}")


@options
class CrossEntropy(Loss):
    """``- log softmax(z)_y``.

    Attributes:
        ignore_index: tokens with this label have no loss, and no gradient.
        shift: logits [B, T, C] at position t predict the label at t + 1 (causal language models
            whose data set has not shifted them already); where a model is captured. ``"auto"``: as
            the model's own loss does it, said through the log.
    """

    name = "cross_entropy"
    ignore_index: int = option(default=IGNORE_INDEX, check=_check_index)
    shift: bool | Literal["auto"] = option(default="auto", check=_check_shift)

    def aligned(self, per_position: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs together of [B, T, ...] and labels [B, T]; [B] have no positions."""
        if self.shift is True and labels.dim() == 2:
            return per_position[:, :-1], labels[:, 1:]
        return per_position, labels

    def check_labels(self, labels: Tensor, num_classes: int) -> None:
        """Integers in [0, C), or ``ignore_index``."""
        check_labels(labels, num_classes, self.ignore_index)

    def valid(self, labels: Tensor) -> Tensor:
        """Those that are not ``ignore_index``."""
        return labels != self.ignore_index

    def residual(
        self, outputs: Tensor, labels: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``delta = c (softmax(z) - onehot(y))``, and ``- c log softmax(z)_y``."""
        return softmax_residual(outputs, labels, scale)

    def output_curvature(self, delta: Tensor, labels: Tensor, scale: Tensor) -> Softmax:
        """``B = diag(p) - p p^T``.

        p is normalised again: where a row sums to 1 + 1e-7, B has a negative eigenvalue.
        """
        p = delta.double() / scale[:, None]
        rows = torch.arange(len(p), device=p.device)
        p.index_put_((rows, labels), p.new_ones(()), accumulate=True).clamp_min_(0)
        return Softmax(p.div_(p.sum(dim=1, keepdim=True)), scale)


@dataclass(frozen=True)
class Softmax(OutputCurvature):
    """``diag(p) - p p^T``.

    Attributes:
        p: [N, C], float64, rows sum to one. scale: [N].
    """

    p: Tensor
    scale: Tensor

    def diagonal(self) -> Tensor:
        """``p (1 - p)``; of the likeliest class ``1 - p`` is the sum of the others.

        By subtraction a confident sample would have none, or a negative one.
        """
        top = self.p.argmax(dim=1, keepdim=True)
        others = self.p.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
        return self.p * (1 - self.p).scatter_(1, top, others)

    def diagonal_in(self, basis: Tensor) -> Tensor:
        """``q_i . (p * q_i) - (p . q_i)^2``."""
        return self.p @ basis.square() - (self.p @ basis).square()

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """``diag(sum w p) - sum w p p^T``, some tokens at a time."""
        classes = self.p.shape[1]
        out, mean = weight.new_zeros(classes, classes), weight.new_zeros(classes)
        step = max(1, _CHUNK_ELEMENTS // classes)
        for start in range(0, len(weight), step):
            q = self.p[start : start + step].to(weight)
            weighted = q * weight[start : start + step, None]
            out.addmm_(weighted.T, q, alpha=-1.0)
            mean += weighted.sum(dim=0)
        out.diagonal().add_(mean)
        return out
