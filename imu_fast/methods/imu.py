"""Influence-guided machine unlearning (arXiv 2508.01620): ascent reweighted by influence."""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method("ascent weighted by influence at the classifier (IMU)", weights="influence")
