"""IMU's control: the same weights, shuffled among the same samples."""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method("ascent with IMU's weights shuffled (control)", weights="permuted")
