"""What is added to a curvature: lam itself, or a multiple of the matrix's mean eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature
from imu_fast.errors import InputError, check_positive, one_of
from imu_fast.factors.source import Factors
from imu_fast.options import option, options

Damping = Literal["add", "relative"]


@options
class Damped(Curvature):
    """A curvature ``M + lam I``.

    Attributes:
        damping: > 0, in units of squared gradients; with ``damping_mode="relative"`` without unit.
        damping_mode: "add": lam is ``damping``; "relative": ``damping`` times the mean eigenvalue
            of the undamped matrix, ``trace / (C D)``, which is ``fitted.damping``.
    """

    damping: float = option(default=1e-2, check=check_positive)
    damping_mode: Damping = option(default="add", check=one_of(*get_args(Damping)))

    def absolute(self, factors: Factors, trace: Callable[[], float | Tensor]) -> float:
        """lam.

        Args:
            trace: of the undamped matrix, which is asked for where it is needed.

        Raises:
            InputError: as :func:`absolute_damping`.
        """
        mean = None
        if self.damping_mode == "relative":
            mean = float(trace()) / (factors.num_classes * factors.width)
        return absolute_damping(self, self.damping, mean, torch.float64)


def absolute_damping(
    spec: Curvature, damping: float, mean: float | None, dtype: torch.dtype
) -> float:
    """lam, which is ``damping`` (times the mean eigenvalue, where there is one).

    Args:
        dtype: what M is held in.

    Raises:
        InputError: the mean eigenvalue is zero or not finite, or lam is nothing in dtype.
    """
    lam = float(damping) * (1.0 if mean is None else mean)
    if mean is not None and not 0 < mean < math.inf:
        raise InputError(
            f"damping_mode='relative' of curvature={spec.name!r} is relative to the mean "
            f"eigenvalue, which is {mean:.3g} of these samples; pass damping_mode='add' with a "
            "damping > 0, or leave out samples without a gradient or with one that is not finite"
        )
    if not torch.finfo(dtype).tiny <= lam <= torch.finfo(dtype).max:
        raise InputError(
            f"damping={damping!r}" + ("" if mean is None else f" times the mean {mean:.3g}") + " is"
            f" beyond the range of {dtype}, which curvature={spec.name!r} is held in here; pass "
            "another damping"
        )
    return lam
