"""What ascent increases, ``f(l_i)``, and what it needs to know of each sample beforehand."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from imu_fast.errors import check_choice
from imu_fast.model.outputs import outputs_of
from imu_fast.options import Options, Table, option, options
from imu_fast.unlearning.ascent.wrong_labels import nearest_wrong_labels, random_wrong_labels
from imu_fast.unlearning.method import Job

_TARGETS = {"random": random_wrong_labels, "nearest": nearest_wrong_labels}


class Objective(Options):
    """``f``; its formula is that of :func:`imu_fast.ops.objective.objective` of this name."""

    def auxiliary(self, job: Job) -> Tensor | None:
        """[n], what the formula needs to know of each sample before the first step, or None."""
        return None


@options
class CrossEntropyAscent(Objective):
    """The cross-entropy, unbounded: the paper's."""

    name = "ce"


@options
class Margin(Objective):
    """Hinge: only samples still predicted as their label push."""

    name = "margin"


@options
class Log1mP(Objective):
    """``log(1 - p_y)``, bounded above by zero."""

    name = "log1mp"


@options
class NPO(Objective):
    """Negative preference optimisation (Zhang et al. 2024): slows down on what is gone."""

    name = "npo"

    def auxiliary(self, job: Job) -> Tensor:
        """``-log p_ref`` of each forget sample under the model as it was trained."""
        return outputs_of(job.model, job.forget, **job.reading.given()).loss


def _check_target(name: str, value: str) -> None:
    check_choice(name, value, _TARGETS)


@options
class Relabel(Objective):
    """Minus the cross-entropy of a wrong class: descent towards it.

    Args:
        target: ``"random"``: drawn once per sample (Graves et al. 2021); ``"nearest"``: the
            likeliest class after one adversarial step (boundary shrink, Chen et al. 2023).
    """

    name = "relabel"
    target: Literal["random", "nearest"] = option(default="random", check=_check_target)

    def auxiliary(self, job: Job) -> Tensor:
        """The class that each sample is moved to: int64."""
        return _TARGETS[self.target](job)


ObjectiveName = Literal["ce", "margin", "log1mp", "npo", "relabel"]
OBJECTIVES: Table[Objective] = Table(
    "objective",
    Objective,
    {
        "ce": CrossEntropyAscent,
        "margin": Margin,
        "log1mp": Log1mP,
        "npo": NPO,
        "relabel": Relabel,
    },
)
