"""The best recipe found so far, by task: ``bench/FINDINGS.md``, ``docs/recipes.md`` have evidence.

* A class: ascent of the forgotten classes' rows alone. What another row would do for a sample of a
  kept class cannot get worse that way: only the forgotten class's own logit moves.
* Samples drawn across classes: the margin edit, the smallest disturbance that flips them. With a
  summary of the training set: Newton removal, and the margin edit from there.
* Sequences: an ascent of the network (:mod:`imu_fast.unlearning.auto_sequences`).

Without a stop rule a class and samples go to forget accuracy zero, samples with a warning that asks
for a depth: a model that never saw them predicts them as well as other unseen data, and flipping
all ruins much. Sequences need one.

What is taken for a classifier changes the head alone: what the features know of the forgotten
remains, as the probe and the relearning steps of a comparison show. Where that matters,
``method="npo", scope="all"`` or retraining is what there is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_fast.errors import InputError
from imu_fast.model.batches import ForgetSet
from imu_fast.model.capture import head_of
from imu_fast.model.head import resolve
from imu_fast.model.reading import Reading
from imu_fast.options import option, options
from imu_fast.unlearning import auto_sequences
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.ascent.optimizer import SGD
from imu_fast.unlearning.ascent.scopes import Head
from imu_fast.unlearning.depth import Depths, StopRule
from imu_fast.unlearning.edit.margin_edit import MarginEdit
from imu_fast.unlearning.edit.newton import NewtonRemoval
from imu_fast.unlearning.head_weight import HeadWeight
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import check_head_layer
from imu_fast.unlearning.summary.summary import TrainingSummary, check_summary


def single_row() -> Ascent:
    """Ascent of the forgotten classes' rows of the head alone; for forgetting a class."""
    return Ascent(scope=Head(rows="forgotten"))


logger = logging.getLogger("imu_fast")

_NAMES = (
    "pass unseen=X, X the model's accuracy on data that it never saw, such as 0.71, or a loader of "
    "such data; or another depth, such as stop=imu_fast.StopRule(forget_accuracy=0.5)"
)


def _warn_of_ruin(what: str, stacklevel: int) -> None:
    warnings.warn(
        f"{what} with method='auto' for samples of classes that are kept: they go to forget "
        "accuracy 0, which ruins much of the model and which no retraining does. Name the depth: "
        f"{_NAMES}",
        stacklevel=stacklevel,
    )


Task = Literal["class", "samples"]
_OWN = ("task", "unseen", "summary")
_ROW = "as near to retraining as another retrained model, and moves no other class's logit"
# The method by the task and by whether there is a summary, and why: docs/recipes.md.
_BEST: dict[tuple[Task, bool], tuple[str, str]] = {
    ("class", False): ("single_row", _ROW),
    ("class", True): ("single_row", f"{_ROW}; a summary made none of the recipes nearer"),
    ("samples", False): ("margin_edit", "nearest to retraining of those that need no summary"),
    ("samples", True): (
        "newton_removal",
        "with the margin edit after it nearest to retraining, and nearer on the forget set than "
        "doing nothing",
    ),
}
# Of the removal and the margin edit after it, chosen on development seeds. k is 1 by the derivation
# where features stay; those of a retrained network do not.
_K, _MARGIN = 2.0, 0.5


def is_class(labels: Tensor, classes: int) -> bool:
    """Whether forget labels [n] are of chosen classes rather than drawn across all of them.

    They are if they hit fewer than half as many of the C classes as n uniform draws would, which
    is ``C (1 - (1 - 1/C)^n)`` in expectation.
    """
    expected = classes * (1 - (1 - 1 / classes) ** len(labels))
    return len(labels.unique()) < expected / 2


def _check_task(name: str, value: Any) -> None:
    if value not in (None, *get_args(Task)):
        raise InputError(f"{name}={value!r} must be 'class' or 'samples'")


def _check_unseen(name: str, value: Any) -> None:
    if value is not None:
        StopRule(unseen_accuracy=value)


def _check_of(summary: TrainingSummary, model: nn.Module, names: list[str], forget: int) -> None:
    """Raise InputError unless a summary is of this model, whether its method reads it or not."""
    layers = [resolve(model, name) for name in names]
    theta = torch.cat([HeadWeight(x.as_linear(), x.name).read() for x in layers], dim=1)
    summary.check_head(theta, len(layers) == 1 and layers[0].bias is not None, forget)


class Taken(NamedTuple):
    """A method under its name, how deep it goes, and why it is this one."""

    name: str
    method: Method
    depths: Depths
    why: str


@options
class Auto(Method):
    """Takes a method by the task: see the module.

    Args:
        task: ``"class"``: the forget set is all that there is of its classes; ``"samples"``: of its
            classes there are others, which are kept. None: samples if the labels are drawn across
            all classes or ``unseen`` is given, else guessed to be a class, which is logged.
        unseen: the depth of samples where no stop rule is given: the model's accuracy on data that
            it never saw, or such data, as ``StopRule(unseen_accuracy=...)``.
        summary: of the training set, by :func:`imu_fast.save_summary`. Its unseen accuracy is the
            depth of samples where neither a stop rule nor ``unseen`` is given.
        given: flat options for the method that is taken; those that it does not have are refused.
    """

    name = "auto"
    sequences = True
    task: Task | None = option(default=None, check=_check_task)
    unseen: Any = option(default=None, check=_check_unseen)
    summary: TrainingSummary | None = option(default=None, check=check_summary)
    given: Mapping[str, Any] | None = option(default=None)

    def _candidates(self) -> dict[str, Method]:
        # A single row moves no other class, so its step may be large: bisection finds the depth.
        large = Ascent(scope=Head(rows="forgotten"), optimizer=SGD(lr=1.0), epochs=1000)
        removal = NewtonRemoval()
        if self.summary is not None:
            then: Any = {"then": "margin_edit", "k": _K, "margin": _MARGIN}
            removal = NewtonRemoval(summary=self.summary, **then)
        return {
            "single_row": large,
            "margin_edit": MarginEdit(),
            "newton_removal": removal,
            "sequences": auto_sequences.WIDEST,
        }

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Its own options, and those of whichever method is taken."""
        found = {name: way for m in self._candidates().values() for name, way in m.paths().items()}
        return {**{name: (name,) for name in _OWN}, **found}

    def flat(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _OWN}, **(self.given or {})}

    def with_options(self, described: str, given: Mapping[str, Any]) -> Self:
        for name in given:
            if name in _OWN:
                continue
            if not any(name in (*m.paths(), *m.shorthands) for m in self._candidates().values()):
                raise InputError(self._unknown(described, name, self))
        own = {name: given.get(name, getattr(self, name)) for name in _OWN}
        rest = {name: value for name, value in given.items() if name not in _OWN}
        return type(self)(**own, given={**(self.given or {}), **rest})

    def choose(self, labels: Tensor, classes: int) -> tuple[Task, str, Method]:
        """The task of these forget labels [n], and the method, its name before it.

        Raises:
            InputError: an option that the method does not have.
        """
        whole = self.unseen is None and is_class(labels, classes)
        task: Task = self.task or ("class" if whole else "samples")
        name, why = _BEST[task, self.summary is not None]
        logger.info("auto takes %s for %s: %s", name, task, why)
        described = f"method='auto' takes {name!r} for these samples, which"
        return task, name, self._candidates()[name].with_options(described, self.given or {})

    def depth(self, labels: Tensor, classes: int, task: Task) -> StopRule:
        """Where a run of no stop rule ends; warns where that is too deep, or a guess."""
        if self.task is None and task == "class":
            logger.warning(
                "task='class' is guessed: %d forget samples are of %d of %d classes, and go to "
                "forget accuracy 0; if these classes have samples that are kept, pass "
                "task='samples'",
                len(labels),
                len(labels.unique()),
                classes,
            )
        if task == "class":
            return StopRule(forget_accuracy=0.0)
        if self.unseen is not None:
            return StopRule(unseen_accuracy=self.unseen)
        if self.summary is not None and self.summary.unseen_accuracy is not None:
            return StopRule(unseen_accuracy=self.summary.unseen_accuracy)
        _warn_of_ruin("stop=None", stacklevel=6)
        return StopRule(forget_accuracy=0.0)

    def for_task(
        self, model: nn.Module, forget: ForgetSet, reading: Reading, depths: Depths
    ) -> Taken:
        """As :meth:`choose`, by the forget set's labels and the model's logits; and how deep.

        Raises:
            InputError: as :meth:`choose`; ``unseen`` beside a stop rule, or for a class; a summary
                of another model.
        """
        if self.task == "class" and self.unseen is not None:
            raise InputError(
                "unseen= with task='class': it is the depth of samples, and a class goes to forget "
                "accuracy 0; leave one of the two out"
            )
        labels = torch.cat([batch[2].flatten().cpu() for batch in forget])
        given = self.given or {}
        layer = given.get("layers", given.get("layer"))
        check_head_layer("layers", layer)
        self._check_one_depth(depths)
        names, classes = head_of(model, forget, reading, layer or "head")
        task, name, method = self.choose(labels, classes)
        if self.summary is not None:
            _check_of(self.summary, model, names, len(labels))
        if task == "samples" and any(rule.forget_accuracy == 0 for rule in depths.rules):
            _warn_of_ruin("forget_accuracy=0", stacklevel=5)
        if not depths.rules:
            depths = Depths(self.depth(labels, classes, task))
        return Taken(name, method, depths, _BEST[task, self.summary is not None][1])

    def for_sequences(self, model: nn.Module, depths: Depths) -> Taken:
        """The method for sequences, and how deep it goes.

        Raises:
            InputError: an option of classifiers alone, or that the method does not have; no depth,
                or two.
        """
        for name in ("task", "summary"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name}= of method='auto' is of samples of one label, and each forget sample "
                    f"is a sequence; leave {name} out"
                )
        self._check_one_depth(depths)
        if self.unseen is not None:
            depths = Depths(StopRule(unseen_accuracy=self.unseen))
        auto_sequences.check_depth(depths)
        given = dict(self.given or {})
        retain = given.pop("retain", None)
        kept = retain is not None
        name, method = auto_sequences.recipe(model, retain)
        why = auto_sequences.WHY[kept]
        logger.info("auto takes %s of the whole network for sequences: %s", name, why)
        if not kept:
            logger.warning(
                "method='auto' with the forget set alone: what a language model knows of other "
                "text may go as well; pass retain=, text that is to stay, or measure that by watch="
            )
        described = f"method='auto' takes {name!r} for sequences, which"
        return Taken(name, method.with_options(described, given), depths, why)

    def _check_one_depth(self, depths: Depths) -> None:
        if depths.rules and self.unseen is not None:
            raise InputError(
                "unseen= of method='auto' is the depth where there is no stop rule; give it to the "
                "rule, stop=imu_fast.StopRule(unseen_accuracy=...)"
            )

    def run(self, job: Job) -> UnlearnResult:
        raise AssertionError("unlearn runs the method that auto takes")
