"""The damped inverse of what a summary has without the forget samples."""

from __future__ import annotations

import logging

from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.unlearning.summary.hessian import Damped, HeadHessian

logger = logging.getLogger("imu_fast")

# Where what is left of the Hessian is not positive, its damping may be raised to this share of
# the mean eigenvalue, or twice what was asked for; rounding and inexact sums need less.
_MOST_DAMPING = 0.1
_AMONG = (
    "The forget samples are to be among those that the summary is of, read in the same way (no "
    "augmentation)"
)


def damped_inverse(
    hessian: HeadHessian, decay: float, eps: float, method: str, whole: bool = True
) -> Damped:
    """``H + (decay + eps mu) I``, its damping raised where that is not positive definite.

    Args:
        eps: relative to mu, the mean eigenvalue. method: its name, for messages.
        whole: whether H is what is left of a summary, and not the forget samples' own.

    Raises:
        InputError: H is zero. SingularMatrixError: it is indefinite by more than rounding.
    """
    mean = hessian.mean_eigenvalue
    if not mean > 0 and not whole:
        raise InputError(
            f"method={method!r}: the forget samples' own Hessian is zero: each is predicted with "
            "probability one, or its loss does not depend on the layer. Pass summary=, of the "
            "training set, name other layers=, or use method='margin_edit'"
        )
    if not mean > 0:
        raise InputError(
            f"method={method!r}: what is to be inverted has the mean eigenvalue {mean:g}; it "
            f"must be positive. {_AMONG}, and not all be predicted with probability one"
        )
    damping = decay + eps * mean
    try:
        return hessian.damped(damping)
    except SingularMatrixError as error:
        needed = 2 * (error.smallest_damping or 0.0)
        if not damping < needed <= max(_MOST_DAMPING, 2 * eps) * mean:
            raise SingularMatrixError(
                f"method={method!r}: what the summary has without the forget samples is no "
                f"Hessian ({error}). {_AMONG}",
                pivot=error.pivot,
                smallest_damping=error.smallest_damping,
            ) from error
    logger.warning(
        "%s: damping raised from %.3g to %.3g (%.2g of the mean eigenvalue): what the "
        "summary has without the forget samples is not positive definite",
        method,
        damping,
        needed,
        needed / mean,
    )
    return hessian.damped(needed)
