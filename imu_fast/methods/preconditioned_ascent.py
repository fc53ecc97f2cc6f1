"""Ascent of the head along its natural directions: a bounded objective, preconditioned.

By default the margin objective and the forget features' second moment; ``precondition="ggn"`` or
``"kfac"`` and ``objective="log1mp"`` or ``"ce"`` are the other corners (SPEC section 5).
"""

from __future__ import annotations

from imu_fast.methods.base import Method

METHOD = Method(
    "preconditioned ascent of the head",
    options={"objective": "margin", "precondition": "features"},
)
