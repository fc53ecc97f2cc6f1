"""The table of losses. Adding one: a file with its options, and its line here."""

from __future__ import annotations

from typing import Literal

from imu_fast.losses.base import Loss
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.options import Table

LOSSES: Table[Loss] = Table(
    "loss",
    Loss,  # type: ignore[type-abstract]
    {"cross_entropy": CrossEntropy},
)
LossName = Literal["cross_entropy"]
