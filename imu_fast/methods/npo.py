"""Negative preference optimisation (Zhang et al. 2024): ascent that slows down on what is gone."""

from __future__ import annotations

from torch import Tensor, nn

from imu_fast.ascent import ForgetSet
from imu_fast.evaluation.metrics import outputs_of
from imu_fast.methods.base import Method


def reference_losses(model: nn.Module, forget: ForgetSet, seed: int) -> Tensor:
    """``-log p_ref`` of each forget sample under the model as it was trained: [n]."""
    return outputs_of(model, forget).loss


METHOD = Method(
    "negative preference optimisation", options={"objective": "npo"}, auxiliary=reference_losses
)
