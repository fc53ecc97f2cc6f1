"""The squared error of regression."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from imu_fast.errors import one_of
from imu_fast.losses.base import Loss, Signal, compute_dtype, per_output
from imu_fast.losses.binary_cross_entropy import Reduction
from imu_fast.losses.output_curvature import Diagonal
from imu_fast.options import option, options


@options
class SquaredError(Loss):
    """``sum_l (z_l - y_l)^2``.

    Labels are finite numbers: [N, L], or [N] for one output. None of them stands for a missing
    one; leave such samples out.

    Attributes:
        reduction: over a token's outputs: "sum", or "mean" (torch's and transformers' default),
            which divides by L.
    """

    name = "squared_error"
    reduction: Reduction = option(default="sum", check=one_of(*get_args(Reduction)))

    def prepared(self, labels: Tensor, num_classes: int) -> Tensor:
        """[N, L], floating."""
        return per_output(labels, num_classes, self.name)

    def valid(self, labels: Tensor) -> Tensor:
        """All."""
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)

    def residual(self, outputs: Tensor, labels: Tensor, scale: Tensor | None) -> Signal:
        """``delta = 2 c (z - y)`` and ``h = 2 c``, both over L for the mean."""
        dtype = compute_dtype(outputs)
        # Labels that float32 does not hold are subtracted as they are.
        wide = torch.promote_types(dtype, labels.dtype)
        error = (outputs.to(wide) - labels.to(wide)).to(dtype)
        factor = torch.ones_like(error[:, :1]) if scale is None else scale[:, None].to(dtype)
        if self.reduction == "mean":
            factor = factor / error.shape[1]
        losses = (error.square() * factor).sum(dim=1)
        return Signal(2 * error * factor, losses, Diagonal((2 * factor).expand_as(error).clone()))
