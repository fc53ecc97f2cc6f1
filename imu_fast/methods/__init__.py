"""Forget-only methods by name, one file each; retraining, their reference, is in ``retrain``."""

from __future__ import annotations

from imu_fast.methods import (
    auto,
    boundary_shrink,
    gradient_ascent,
    imu,
    loss_weights,
    margin_edit,
    npo,
    permuted_weights,
    preconditioned_ascent,
    random_label,
    single_row,
)
from imu_fast.methods.base import Method

METHODS: dict[str, Method] = {
    "auto": auto.METHOD,
    "imu": imu.METHOD,
    "permuted": permuted_weights.METHOD,
    "loss_weights": loss_weights.METHOD,
    "uniform": gradient_ascent.METHOD,
    "npo": npo.METHOD,
    "random_label": random_label.METHOD,
    "boundary_shrink": boundary_shrink.METHOD,
    "preconditioned": preconditioned_ascent.METHOD,
    "single_row": single_row.METHOD,
    "margin_edit": margin_edit.METHOD,
}


def methods() -> list[str]:
    """Names that ``method=`` accepts."""
    return list(METHODS)
