"""Uniform ascent of the forgotten classes' rows of the head alone; for forgetting a class."""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method("ascent of the forgotten classes' rows alone", options={"rows": "forgotten"})
