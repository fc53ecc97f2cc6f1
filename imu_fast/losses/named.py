"""The table of losses. Adding one: a file with its options, and its line here."""

from __future__ import annotations

from typing import Literal

from imu_fast.losses.auto import AutoLoss
from imu_fast.losses.base import Loss
from imu_fast.losses.binary_cross_entropy import BinaryCrossEntropy
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.losses.squared_error import SquaredError
from imu_fast.options import Table

LOSSES: Table[Loss] = Table(
    "loss",
    Loss,  # type: ignore[type-abstract]
    {
        "auto": AutoLoss,
        "binary_cross_entropy": BinaryCrossEntropy,
        "cross_entropy": CrossEntropy,
        "squared_error": SquaredError,
    },
)
LossName = Literal["auto", "binary_cross_entropy", "cross_entropy", "squared_error"]
