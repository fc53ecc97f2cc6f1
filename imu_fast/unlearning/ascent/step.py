"""One step of an ascent, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from imu_fast.unlearning.ascent.objectives import Auxiliary, Objective
from imu_fast.unlearning.ascent.optimizer import Optimizer
from imu_fast.unlearning.ascent.retain import Retain
from imu_fast.unlearning.subject import Scored, Subject


@dataclass(frozen=True)
class Rule:
    """What a step minimises: ``- sum_i w_i f(l_i) / sum_i w_i + alpha ||theta||_1``, and by what.

    Attributes:
        objective: f. auxiliary: what it needs to know of each forget sample, or None.
        retain: what is added for data that is to stay, or None.
        samples: the name of the set that the steps run on, sample by sample the forget set.
    """

    objective: Objective
    auxiliary: Auxiliary | None
    alpha: float
    optimizer: Optimizer
    retain: Retain | None = None
    samples: str = "forget"


class Steps(Protocol):
    """Makes the steps of an ascent.

    Attributes:
        subject: what they change.
        optimizer: what they change it by.
        sequence: several steps at once, for where the loop has nothing to do between them; or None.
    """

    @property
    def subject(self) -> Subject: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def sequence(self) -> Callable[[Tensor, Tensor], Tensor] | None: ...

    def seen(self, rows: Tensor, layers: str) -> Scored:
        """What the weights of the next step, on samples of ``rows`` [B], are made of."""
        ...

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        """One reweighted step on forget samples ``rows`` [B]; returns the loss (scalar tensor)."""
        ...
