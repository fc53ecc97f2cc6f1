"""The best forget-only recipe found so far, by task: ``bench/FINDINGS.md`` has the evidence.

* A class: ascent of the forgotten classes' rows alone. What another row would do for a sample of a
  kept class cannot get worse that way: only the forgotten class's own logit moves.
* Samples drawn across classes: the margin edit, the smallest disturbance that flips them.

Without a stop rule both go to forget accuracy zero. Both change the head alone: what the features
know of the forgotten remains, as the probe and the relearning steps of a comparison show. Where
that matters, ``method="npo", scope="all"`` or retraining is what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_fast.errors import InputError
from imu_fast.model.batches import ForgetSet
from imu_fast.model.capture import head_of
from imu_fast.model.reading import Reading
from imu_fast.options import option, options
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.ascent.optimizer import SGD
from imu_fast.unlearning.ascent.scopes import Head
from imu_fast.unlearning.edit.margin_edit import MarginEdit
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import check_head_layer


def single_row() -> Ascent:
    """Ascent of the forgotten classes' rows of the head alone; for forgetting a class."""
    return Ascent(scope=Head(rows="forgotten"))


def is_class(labels: Tensor, classes: int) -> bool:
    """Whether forget labels [n] are of chosen classes rather than drawn across all of them.

    They are if they hit fewer than half as many of the C classes as n uniform draws would, which
    is ``C (1 - (1 - 1/C)^n)`` in expectation.
    """
    expected = classes * (1 - (1 - 1 / classes) ** len(labels))
    return len(labels.unique()) < expected / 2


@options
class Auto(Method):
    """Takes a method by the task: see the module.

    Args:
        given: flat options for the method that is taken; those that it does not have are refused.
    """

    name = "auto"
    given: Mapping[str, Any] | None = option(default=None)

    @staticmethod
    def _candidates() -> dict[str, Method]:
        # A single row moves no other class, so its step may be large: bisection finds the depth.
        large = Ascent(scope=Head(rows="forgotten"), optimizer=SGD(lr=1.0), epochs=1000)
        return {"single_row": large, "margin_edit": MarginEdit()}

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Options of whichever method is taken."""
        return {name: path for m in self._candidates().values() for name, path in m.paths().items()}

    def flat(self) -> dict[str, Any]:
        return dict(self.given or {})

    def with_options(self, described: str, given: Mapping[str, Any]) -> Self:
        for name in given:
            if not any(name in (*m.paths(), *m.shorthands) for m in self._candidates().values()):
                raise InputError(self._unknown(described, name, self))
        return type(self)(given={**(self.given or {}), **given})

    def choose(self, labels: Tensor, classes: int) -> tuple[str, Method]:
        """The method for these forget labels [n], and its name.

        Raises:
            InputError: an option that it does not have.
        """
        name = "single_row" if is_class(labels, classes) else "margin_edit"
        described = f"method='auto' takes {name!r} for these samples, which"
        return name, self._candidates()[name].with_options(described, self.given or {})

    def for_task(self, model: nn.Module, forget: ForgetSet, reading: Reading) -> tuple[str, Method]:
        """As :meth:`choose`, by the forget set's labels and the model's logits."""
        labels = torch.cat([batch[2].flatten().cpu() for batch in forget])
        given = self.given or {}
        layer = given.get("layers", given.get("layer"))
        check_head_layer("layers", layer)
        return self.choose(labels, head_of(model, forget, reading, layer or "head")[1])

    def run(self, job: Job) -> UnlearnResult:
        raise AssertionError("unlearn runs the method that auto takes")
