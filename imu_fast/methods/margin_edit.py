"""The smallest edit of the head that flips the chosen samples: a quadratic program (SPEC 5)."""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method("smallest edit of the head that flips the forget samples", edits=True)
