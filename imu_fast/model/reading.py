"""How a model is read: where its logits are, and the loss that these and the labels give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import TypedDict

from imu_fast.errors import InputError
from imu_fast.losses.auto import AutoLoss
from imu_fast.losses.base import Loss
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.losses.named import LOSSES, LossName
from imu_fast.model.forward import innermost
from imu_fast.model.labels import class_labels
from imu_fast.model.logits import Path
from imu_fast.options import Choice, Options, option, options

# A key, an attribute, an index, a path of these, or a function of what the model returns.
Output = str | int | Path | Callable[[Any], Tensor]


class ReadingOptions(TypedDict, total=False):
    """Flat options of how a model is read: every door that takes a model has them.

    * ``output``: where the logits are in what the model returns: a key, an attribute, an index, a
      path of these, or a function of it. Without: the tensor, what is called ``logits``, or what
      fits the labels.
    * ``loss``: a name, or an object such as ``imu.CrossEntropy(shift=True)``; ``"auto"`` follows a
      transformers model's ``config.problem_type``. The others are options of the named one
      (``reduction`` is the object's alone).
    """

    output: Output
    loss: LossName | Loss
    ignore_index: int
    shift: bool | Literal["auto"]
    shift_labels: bool | Literal["auto"]
    label_smoothing: float
    class_weights: Sequence[float] | Tensor
    pos_weight: float | Sequence[float] | Tensor


def _check_output(name: str, value: Any) -> None:
    if value is None or callable(value):
        return
    steps = value if isinstance(value, tuple) else (value,)
    good = all(isinstance(step, str | int) and not isinstance(step, bool) for step in steps)
    if not steps or not good:
        raise InputError(
            f"{name}={value!r}; pass a key, an attribute, an index, a path of these as a tuple, "
            "or a function of the model's output"
        )


@options
class Reading(Options):
    """How a model is read: see :class:`ReadingOptions`."""

    name = "reading"
    output: Output | None = option(default=None, check=_check_output)
    loss: Choice[Loss, LossName] = Choice(LOSSES, "cross_entropy")

    @classmethod
    def of(cls, door: str, given: Mapping[str, Any]) -> Reading:
        """What a door was given, flat.

        Raises:
            InputError: an option that is none of these, or a bad value.
        """
        return cls().with_options(door, given)

    def following(self, model: nn.Module) -> Reading:
        """With what ``loss="auto"`` finds in the model's config."""
        config = getattr(innermost(model), "config", None)
        if not isinstance(self.loss, AutoLoss) or self.loss.problem_type or config is None:
            return self
        kind = getattr(config, "problem_type", None)
        if kind is None and getattr(config, "num_labels", None) == 1:
            kind = "regression"
        open_ = kind is None and hasattr(config, "problem_type")
        return replace(self, loss=replace(self.loss, problem_type=kind, by_labels=open_))

    def given(self) -> dict[str, Any]:
        """As flat options of another door."""
        return {"output": self.output, "loss": self.loss}

    def of_classes(self, door: str) -> CrossEntropy:
        """The loss, where it has to be that of a classifier with one label per sample.

        Raises:
            InputError: it is another.
        """
        loss = self.loss
        if not isinstance(loss, CrossEntropy) or loss.shift is True or not loss.plain:
            raise InputError(
                f"{door} takes loss={loss!r}, where it is for classifiers: loss='cross_entropy', "
                "plain, and one label per sample; scores (imu_fast.influence_scores) take every "
                "loss"
            )
        return loss

    def of_tokens(self, door: str) -> CrossEntropy:
        """The loss, where it has to be the plain one of a sequence's tokens.

        Raises:
            InputError: it is another.
        """
        loss = self.loss
        if not isinstance(loss, CrossEntropy) or not loss.plain:
            raise InputError(
                f"{door} takes loss={loss!r}, where sequences are measured by the plain "
                "loss='cross_entropy'; scores (imu_fast.influence_scores) take every loss"
            )
        return loss

    @staticmethod
    def check_one_label(logits: Tensor, door: str) -> None:
        """Raise InputError for the logits of sequences."""
        if logits.dim() != 2:
            raise InputError(
                f"{door} is for classifiers, with one label per sample; the logits have shape "
                f"{tuple(logits.shape)}, of sequences"
            )

    def labels_of_all(self, labels: Tensor, logits: Tensor, door: str) -> Tensor:
        """One class index per row of the logits: int64, none of them without a loss.

        Raises:
            InputError: other shapes, out of range, or ``ignore_index``.
        """
        loss = self.of_classes(door)
        self.check_one_label(logits, door)
        labels = class_labels(labels, logits.shape)
        loss.check_labels(labels, logits.shape[-1])
        if not bool(loss.valid(labels.flatten()).all()):
            raise InputError(
                f"a batch has samples without a label ({loss.ignore_index}), which are neither "
                "forgotten nor counted; remove them"
            )
        return labels


OPTIONS = frozenset(ReadingOptions.__annotations__)


def taken(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat options of the reading, and those of something else."""
    own = {name: value for name, value in given.items() if name in OPTIONS}
    return own, {name: value for name, value in given.items() if name not in OPTIONS}
