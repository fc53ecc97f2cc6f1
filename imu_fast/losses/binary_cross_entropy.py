"""Binary cross-entropy of sigmoid outputs: one of them, or many labels at once."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from imu_fast.errors import InputError, one_of
from imu_fast.losses.base import Loss, Signal, compute_dtype, numbers, per_output
from imu_fast.losses.cross_entropy import IGNORE_INDEX, check_index
from imu_fast.losses.output_curvature import Diagonal
from imu_fast.options import option, options

Reduction = Literal["sum", "mean"]


@options
class BinaryCrossEntropy(Loss):
    """``- sum_l [v_l y_l log p_l + (1 - y_l) log(1 - p_l)]`` with ``p = sigmoid(z)``.

    Labels are in [0, 1], numbers of any dtype or bool: [N, L], or [N] for one output.

    Attributes:
        pos_weight: v, one number or L of them, not negative; None: 1.
        reduction: over a token's outputs: "sum", or "mean" (torch's and transformers' default),
            which divides by the number of its labels that are there.
        ignore_index: an output with this label has no loss, as in data where some labels are
            unknown; a token without any label has none. (torch has no such thing here: it takes
            -100 for a probability.)
    """

    name = "binary_cross_entropy"
    pos_weight: float | tuple[float, ...] | None = option(default=None, check=numbers)
    reduction: Reduction = option(default="sum", check=one_of(*get_args(Reduction)))
    ignore_index: int = option(default=IGNORE_INDEX, check=check_index)

    def check(self) -> None:
        """Weights become a tuple, whatever they were given as."""
        object.__setattr__(self, "pos_weight", numbers("pos_weight", self.pos_weight))
        if self.ignore_index in (0, 1):
            raise InputError(f"ignore_index={self.ignore_index} is a label; use another number")

    def _weights(self, like: Tensor) -> Tensor:
        v = self.pos_weight if isinstance(self.pos_weight, tuple) else (1.0,)
        return torch.tensor(v, dtype=like.dtype, device=like.device)

    def prepared(self, labels: Tensor, num_classes: int) -> Tensor:
        """[N, L], floating."""
        found = per_output(labels, num_classes, self.name)
        if isinstance(self.pos_weight, tuple) and len(self.pos_weight) not in (1, num_classes):
            raise InputError(
                f"pos_weight has {len(self.pos_weight)} numbers; the head has {num_classes} outputs"
            )
        bad = ((found < 0) | (found > 1)) & (found != self.ignore_index)
        if bool(bad.any()):
            row, column = torch.nonzero(bad)[0].tolist()
            raise InputError(
                f"labels[{row}] has {float(found[row, column]):g} for output {column}, which is "
                f"outside [0, 1] and is not ignore_index={self.ignore_index}"
            )
        return found

    def valid(self, labels: Tensor) -> Tensor:
        """Those with a label."""
        return (labels != self.ignore_index).any(dim=1)

    def residual(self, outputs: Tensor, labels: Tensor, scale: Tensor | None) -> Signal:
        """``delta = (1 - y) p - v y (1 - p)`` and ``h = (1 - y + v y) p (1 - p)``, times ``c``."""
        z = outputs.to(compute_dtype(outputs))
        there = labels != self.ignore_index
        y = labels.where(there, 0.0).to(z)
        factor = there.to(z)
        if self.reduction == "mean":
            factor = factor / factor.sum(dim=1, keepdim=True).clamp_min(1)
        if scale is not None:
            factor = factor * scale[:, None].to(z)
        on, off = y * self._weights(z) * factor, (1 - y) * factor
        p, rest = torch.sigmoid(z), torch.sigmoid(-z)
        losses = -(on * logsigmoid(z) + off * logsigmoid(-z)).sum(dim=1)
        return Signal(off * p - on * rest, losses, Diagonal((on + off) * p * rest))
