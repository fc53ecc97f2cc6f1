"""IMU's cheapest rival: a sample weighs what its loss is, by IMU's own rule (SPEC section 4)."""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method("ascent weighted by the square root of the loss", weights="loss")
