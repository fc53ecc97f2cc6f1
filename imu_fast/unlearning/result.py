"""What unlearning returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from imu_fast.errors import ImuFastError

Record = dict[str, float]


class DivergedError(ImuFastError, ArithmeticError):
    """The ascent's loss is no longer finite; the model is as it was before."""


@dataclass(repr=False)
class UnlearnResult:
    """The outcome of :func:`imu_fast.unlearn`.

    Attributes:
        model: the unlearned model (the user's own with ``inplace=True``).
        scores: [n] influence before the first step (minus the loss where that weighs); None
            for uniform weights.
        indices, weights: the selected forget samples [k] and their last weights [k].
        dataset_indices: [n], the place in the user's dataset of each forget sample, in whose order
            scores and indices are; None where samples have none.
        trajectory: one dict per record: step, epoch, forget_loss, forget_accuracy, the weights'
            mean, std and count, and ``<name>_loss``, ``<name>_accuracy`` per watched set. The last
            record is measured by the model's own forward pass. Of sequences, loss and accuracy are
            means over samples of the means over their tokens.
        batch_losses: the ascent's loss at every step.
        steps, epochs: optimizer steps made (an edit is one), and epochs begun.
        stopped_by: "epochs", "max_steps", "milestones" (the last one was passed), "edit" (all that
            was asked for), "left_alone" (``"auto"`` found nothing to forget), "no_descent" (no step
            of a self-distillation lowers its loss, and targets further away do not help), or the
            stop rule's condition.
        reached: whether the depth that was asked for (stop, or the last milestone) is there, by the
            model's own forward pass; None where none was asked for.
        step_fraction: how much of the last step was kept by the bisection, in (0, 1]; of
            ``"newton_removal"`` its k; 0 of an edit that was not needed.
        seconds: wall-clock time of the whole call.
        settings: the method and every option of it, as used; of an edit also its Hessian's kind
            and the damping that it came to.
        backends: which backend, or backends, ran each operation: see ``imu.record_backends``.
        precisions: what each one's matrix products were made in: see ``imu.use_precision``.
    """

    model: nn.Module
    scores: Tensor | None
    indices: Tensor
    weights: Tensor
    trajectory: list[Record] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0
    stopped_by: str = "epochs"
    step_fraction: float = 1.0
    reached: bool | None = None
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    dataset_indices: list[int] | None = None
    precisions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: what was done, and what it did to the forget set."""
        first, last = self.trajectory[0], self.trajectory[-1]
        accuracies = f"{first['forget_accuracy']:.3f} -> {last['forget_accuracy']:.3f}"
        missed = ", depth NOT reached" if self.reached is False else ""
        return (
            f"UnlearnResult({self.settings.get('method', '?')}: forget accuracy {accuracies} in "
            f"{last['step']:g} steps, stopped by {self.stopped_by}, {self.seconds:.2f} s{missed})"
        )

    def table(self) -> str:
        """The trajectory, a line per record, as a Markdown table."""
        names = list(dict.fromkeys(name for record in self.trajectory for name in record))
        rows = [
            [f"{record[name]:.4g}" if name in record else "" for name in names]
            for record in self.trajectory
        ]
        widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
        lines = [
            " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (names, *rows)
        ]
        rule = " | ".join("-" * (width - 1) + ":" for width in widths)
        return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))
