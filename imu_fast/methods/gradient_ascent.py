"""Gradient ascent on the forget set (Thudi et al. 2022), every sample alike."""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method("uniform gradient ascent")
