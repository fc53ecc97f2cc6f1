"""What objectives need to know of each forget sample before the first step."""

from __future__ import annotations

from torch import Tensor, nn

from imu_fast.model.batches import ForgetSet
from imu_fast.model.outputs import outputs_of


def reference_losses(model: nn.Module, forget: ForgetSet, seed: int) -> Tensor:
    """``-log p_ref`` of each forget sample under the model as it was trained: [n]."""
    return outputs_of(model, forget).loss
