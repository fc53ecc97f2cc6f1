"""What is changed by unlearning, as its methods see it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.model.outputs import Measurement
from imu_fast.unlearning.ascent.graph import StepSequence


class Measured(Protocol):
    """Something that can say how a set is classified at its current state."""

    def measure(self, name: str) -> Measurement:
        """Measure the set ``name``: "forget", "unseen" or a watched one."""
        ...


class Problem(Measured, Protocol):
    """What the ascent loop drives.

    sequence: several steps at once, for where the loop has nothing to do between them; or None.
    """

    n: int
    optimizer: torch.optim.Optimizer

    @property
    def sequence(self) -> StepSequence | None: ...

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        """One reweighted step on forget samples ``rows`` [B]; returns the loss (scalar tensor)."""
        ...

    def factors(self, rows: Tensor | None = None) -> list[GradientFactors]:
        """Gradient factors of the forget samples at the current state, one entry per layer."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that ascent changes, by name; the live tensors, not copies."""
        ...

    def finish(self) -> None:
        """Leave the result in the user's model."""
        ...
