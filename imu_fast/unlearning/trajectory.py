"""What is measured on the way: each state once, and the records that users see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from imu_fast.model.outputs import Measurement
from imu_fast.unlearning.result import DivergedError, Record
from imu_fast.unlearning.subject import Measured

Callback = Callable[[Record], None]


class Trajectory:
    """Records of a run.

    Args:
        subject: what changes. watch: names of the sets that are recorded beside the forget set.
        callback: called with each record as it is made.
    """

    def __init__(self, subject: Measured, watch: Sequence[str], callback: Callback | None) -> None:
        self.records: list[Record] = []
        self._subject, self.watched, self._callback = subject, list(watch), callback
        self._measured: dict[str, Measurement] = {}

    def moved(self) -> None:
        """The subject is no longer where it was measured."""
        self._measured.clear()

    def measure(self, name: str) -> Measurement:
        """The subject's measurement at its present state, made once.

        Raises:
            DivergedError: finite weights may still give logits that are not.
        """
        if name not in self._measured:
            measured = self._subject.measure(name)
            if not bool(torch.isfinite(measured.loss).all()):
                raise DivergedError(f"the logits of the {name} set are no longer finite")
            self._measured[name] = measured
        return self._measured[name]

    def entry(self, step: float, epoch: int, extra: Mapping[str, float] | None = None) -> Record:
        """The record of the present state, not kept."""
        entry: Record = {"step": step, "epoch": epoch}
        for name in ("forget", *self.watched):
            measured = self.measure(name)
            entry[f"{name}_loss"] = measured.mean_loss
            entry[f"{name}_accuracy"] = measured.accuracy
        return entry | dict(extra or {})

    def record(self, step: float, epoch: int, extra: Mapping[str, float] | None = None) -> None:
        """Keep the record of the present state."""
        self.records.append(self.entry(step, epoch, extra))
        if self._callback is not None:
            self._callback(dict(self.records[-1]))

    def correct(self, measured: Record) -> None:
        """Put what the model itself does into the last record."""
        self.records[-1] |= measured


def spread(weights: Tensor) -> dict[str, float]:
    """The sample weights' statistics in a record."""
    return {
        "weight_count": len(weights),
        "weight_mean": float(weights.mean()),
        "weight_std": float(weights.std(unbiased=False)),
    }
