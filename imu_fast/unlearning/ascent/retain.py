"""Data that is to stay as it is, for those who have it: a second term of the ascent's loss."""

from __future__ import annotations

from typing import Any, Literal

from imu_fast.errors import InputError, check_choice, check_positive
from imu_fast.options import Options, Table, option, options

# Of what is trained on or kept, and not measured: names among a job's sets.
RETAIN, ASCENDED = "(retain)", "(ascended)"


def _check_data(name: str, value: Any) -> None:
    if value is None or isinstance(value, str):
        raise InputError(
            f"{name}={value!r}; pass retain=, a DataLoader, batches, or tensors (X, y)"
        )


def _check_loss(name: str, value: str) -> None:
    check_choice(name, value, ("ce", "kl"))


class Retained(Options):
    """What is kept, and how."""

    name = "retained"


@options
class NoRetain(Retained):
    """Nothing: the forget set is all there is."""

    name = "none"


@options
class Retain(Retained):
    """Adds ``retain_weight`` times the mean loss of as many retain samples, drawn for each step.

    Args:
        data: a loader, batches, or tensors (X, y).
        retain_loss: ``"ce"``: their cross-entropy (gradient difference, Liu et al. 2022);
            ``"kl"``: the Kullback-Leibler divergence of the model's predictions from those of the
            model as it was, KL(original || model).
        retain_weight: of the term.
    """

    name = "retain"
    data: Any = option(check=_check_data)
    retain_loss: Literal["ce", "kl"] = option(default="ce", check=_check_loss)
    retain_weight: float = option(default=1.0, check=check_positive)


def _of_data(value: Any) -> Retained | None:
    return None if isinstance(value, Options | type) else Retain(data=value)


RETAINS: Table[Retained] = Table("retain", Retained, {"none": NoRetain}, _of_data)
