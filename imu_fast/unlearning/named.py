"""Forget-only methods by name."""

from __future__ import annotations

from imu_fast.unlearning import auto
from imu_fast.unlearning.ascent.objectives import reference_losses
from imu_fast.unlearning.ascent.wrong_labels import nearest_wrong_labels, random_wrong_labels
from imu_fast.unlearning.method import Method

METHODS: dict[str, Method] = {
    # A single row moves no other class, so its step may be large: bisection finds the depth.
    "auto": Method(
        "single_row for a class, margin_edit for samples drawn across classes",
        options={"lr": 1.0, "epochs": 1000},
        choose=auto.choose,
    ),
    "imu": Method("ascent weighted by influence at the classifier (IMU)", weights="influence"),
    "permuted": Method("ascent with IMU's weights shuffled (control)", weights="permuted"),
    "loss_weights": Method("ascent weighted by the square root of the loss", weights="loss"),
    "uniform": Method("uniform gradient ascent"),
    "npo": Method(
        "negative preference optimisation",
        options={"objective": "npo"},
        auxiliary=reference_losses,
    ),
    "random_label": Method(
        "descent on random wrong labels",
        options={"objective": "relabel"},
        auxiliary=random_wrong_labels,
    ),
    "boundary_shrink": Method(
        "descent on the nearest wrong class (boundary shrink)",
        options={"objective": "relabel"},
        auxiliary=nearest_wrong_labels,
    ),
    "preconditioned": Method(
        "preconditioned ascent of the head",
        options={"objective": "margin", "precondition": "features"},
    ),
    "single_row": Method(
        "ascent of the forgotten classes' rows alone", options={"rows": "forgotten"}
    ),
    "margin_edit": Method("smallest edit of the head that flips the forget samples", edits=True),
}


def methods() -> list[str]:
    """Names that ``method=`` accepts."""
    return list(METHODS)
