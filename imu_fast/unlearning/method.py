"""What a forget-only method is: how it weighs samples, and the ascent's options that define it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from imu_fast.model.batches import ForgetSet

WEIGHTS = ("influence", "permuted", "loss", "uniform")


@dataclass(frozen=True)
class Method:
    """One method; ``unlearn(model, forget_loader, method=name, ...)`` runs it.

    Attributes:
        summary: one line, with its source.
        weights: how forget samples are weighed: by ``"influence"``, by influence ``"permuted"``
            among them, by ``"loss"``, or ``"uniform"``.
        options: defaults of ``unlearn``'s arguments; an argument that is given wins.
        auxiliary: ``(model, forget set, seed) -> [n]``, what the objective needs to know of each
            sample, computed before the first step.
        edits: no ascent: the head is computed at once, in ``imu_fast.edit``.
        choose: ``(labels [n], C) -> name`` of the method to run instead, under these options.
    """

    summary: str
    weights: str = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)
    auxiliary: Callable[[nn.Module, ForgetSet, int], Tensor] | None = None
    edits: bool = False
    choose: Callable[[Tensor, int], str] | None = None
