"""What is reported is what is: at the end the user's model is measured by its own forward pass."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch

from imu_fast.errors import InputError
from imu_fast.model.outputs import Measurement
from imu_fast.unlearning.depth import BISECTIONS, StopRule
from imu_fast.unlearning.result import Record
from imu_fast.unlearning.subject import HeadSubject, Subject
from imu_fast.unlearning.trajectory import Trajectory

logger = logging.getLogger("imu_fast")

# Another order of sums moves a loss by some ten roundings of the logits; a model that computes
# something else moves it by its own size.
_ROUNDINGS = 1e3
# How far beyond the bisected depth the model's own forward may have to go, in 2^-12 of the step.
_FURTHER = (0, 1, 4, 16, 64, 256)
# From this share of updates that half precision rounds away on, it is said.
_SAID = 0.1
# From this share on they are most of it.
_REFUSED = 0.5


class _Own:
    """The user's model, measured by itself, each set once."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._found: dict[str, Measurement] = {}

    def measure(self, name: str) -> Measurement:
        if name not in self._found:
            self._found[name] = self._subject.own(name)
        return self._found[name]


def confirm(
    subject: Subject,
    trajectory: Trajectory,
    stop: StopRule | None,
    t: float,
    move_to: Callable[[float], None],
) -> tuple[float, str | None]:
    """Leave the result in the model, and make the last record what the model itself does.

    Where its own forward pass is a rounding short of the depth, the last step is kept a little
    longer.

    Args:
        stop: the rule that ended the run, or None.
        t: the fraction kept of the last step. move_to: moves the subject to a fraction.

    Returns:
        The fraction kept, and the condition of ``stop`` that the model meets, or None.

    Raises:
        InputError: the model does something else than the head on its features.
    """
    reached = None
    for further in _FURTHER:
        if further:
            if stop is None or reached or t >= 1.0:
                break
            t = min(1.0, t + further * 2.0**-BISECTIONS)
            move_to(t)
            trajectory.moved()
        subject.finish()
        own = _Own(subject)
        _check_same(subject, trajectory.measure("forget"), own.measure("forget"))
        reached = None if stop is None else stop.reached(own)
    trajectory.correct(_record(own, trajectory.watched))
    _check_rounding(subject, reached is not None)
    return t, reached


def _record(own: _Own, names: list[str]) -> Record:
    record: Record = {}
    for name in ("forget", *names):
        measured = own.measure(name)
        record[f"{name}_loss"] = measured.mean_loss
        record[f"{name}_accuracy"] = measured.accuracy
    return record


def _check_same(subject: Subject, ours: Measurement, own: Measurement) -> None:
    if not isinstance(subject, HeadSubject):
        return
    eps = torch.finfo(subject.computed).eps
    difference = (ours.loss.double() - own.loss.double()).abs()
    size = 1.0 + float(subject.theta.abs().max()) + ours.loss.double().abs()
    if bool((difference <= _ROUNDINGS * max(eps, 2.0**-23) * size).all()):
        return
    sample = int((difference / size).argmax())
    theirs, cached = float(own.loss[sample]), float(ours.loss[sample])
    raise InputError(
        f"the model's own forward pass gives sample {sample} a loss of {theirs:.4g}, the head "
        f"{subject.name!r} on its features {cached:.4g}: something changes features or logits "
        "between passes (a layer that draws numbers in evaluation mode, a weight made anew, state "
        "that a forward pass changes, a data set that augments by a generator of its own); the "
        "model is as it was. Make that deterministic, or use "
        "scope='layers', which runs the model itself"
    )


def _check_rounding(subject: Subject, deep_enough: bool) -> None:
    """Half precision may round away what was done: said, or refused where that is most of it."""
    lost = subject.rounded_away()
    if lost <= _SAID:
        return
    dtype = subject.dtype
    what = (
        f"{100 * lost:.0f} % of the changed weights are below the resolution of "
        f"{str(dtype).removeprefix('torch.')}, in which the model holds them, and stay as they were"
    )
    if lost > _REFUSED and not deep_enough:
        raise InputError(
            f"{what}: the model would be nearly the same, so it is left as it was; use a larger lr "
            "or more epochs, a stop rule, or the model in float32 (model.float())"
        )
    logger.warning("%s; a larger lr, or the model in float32, keeps them", what)


def warn_unless_reached(reached: bool | None, wanted: str, measured: Record) -> None:
    """A depth that was asked for and is not there is a warning, never silence."""
    if reached is False:
        warnings.warn(
            f"the depth that was asked for ({wanted}) is not reached: forget accuracy is "
            f"{measured['forget_accuracy']:.3f}, forget loss {measured['forget_loss']:.3g}; give "
            "a larger budget (epochs, max_steps) or lr, where the method has them (result.reached "
            "is False)",
            stacklevel=4,
        )
