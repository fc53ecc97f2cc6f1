"""Random labels (Graves et al. 2021): descent towards a wrong class, drawn once per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imu_fast.ascent import ForgetSet
from imu_fast.evaluation.metrics import outputs_of
from imu_fast.methods.base import Method


def wrong_labels(model: nn.Module, forget: ForgetSet, seed: int) -> Tensor:
    """A class other than its label for each forget sample, uniform: [n] int64."""
    outputs = outputs_of(model, forget)
    classes = outputs.logits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, classes, outputs.labels.shape, generator=generator)
    return (outputs.labels + shift.to(outputs.labels.device)) % classes


METHOD = Method(
    "descent on random wrong labels", options={"objective": "relabel"}, auxiliary=wrong_labels
)
