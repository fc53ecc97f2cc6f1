"""A solve that is refined until its recomputed residual is small, or says that it is not."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from imu_fast.curvature.base import Fitted
from imu_fast.curvature.ggn.iterative import DearerError, Iterative
from imu_fast.solvers.conjugate_gradient import Approximate, refine

logger = logging.getLogger("imu_fast")


class RefinedGGN(Fitted):
    """A GGN with the certificate of its last solve.

    Attributes:
        tolerance: of the relative residual.
        residual: that of the last solve, recomputed in float64 (the largest of several right-hand
            sides). iterations: conjugate-gradient iterations of it.
    """

    tolerance: float
    iterations: int

    def _iterated(self, iterative: Iterative, many: Tensor, most: float) -> Tensor | None:
        """X by conjugate gradient; None where its first iterations say that it takes too long.

        Args:
            most: see :meth:`Iterative.approximates`.
        """
        try:
            return self._refined(iterative.approximates(most), many, self.tolerance)
        except DearerError:
            logger.info("ggn: conjugate gradient is slow here: left for a factor")
            return None

    def _refined(self, approximates: Sequence[Approximate], many: Tensor, goal: float) -> Tensor:
        """X for right-hand sides [m, C, D], by refinement of what solves approximately.

        Args:
            goal: that refinement goes on to; at most the tolerance.
        """
        solution = refine(self._product, approximates, many, tolerance=goal)
        self.residual, self.iterations = solution.residual, solution.iterations
        if self.residual > self.tolerance:
            logger.warning(
                "ggn: relative residual %.2g is above the tolerance %.2g at damping %g",
                self.residual,
                self.tolerance,
                self.damping,
            )
        return solution.x
