"""Uniform ascent of the forgotten classes' rows of the head alone; for forgetting a class."""

from __future__ import annotations

from imu_fast.methods.base import Method

# A single row moves no other class, so the step may be large; bisection finds the depth.
METHOD = Method(
    "ascent of the forgotten classes' rows alone",
    options={"rows": "forgotten", "lr": 1.0, "epochs": 1000},
)
