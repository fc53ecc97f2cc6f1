"""The best recipe found so far, by task: ``bench/FINDINGS.md``, ``docs/recipes.md`` have evidence.

* A class: ascent of the forgotten classes' rows alone. What another row would do for a sample of a
  kept class cannot get worse that way: only the forgotten class's own logit moves.
* Samples drawn across classes, to the accuracy on unseen data: self-distillation of the head and
  the layers before it, in the metric of a training set's summary or of the forget set's own.
  Where the forget set is predicted no better than unseen data, as far as so few samples can tell,
  and no depth is named, the model is left alone: a retrained one is expected to do the same.
* Samples to another depth, or where self-distillation cannot be: the margin edit, the smallest
  disturbance that flips them. With a summary: Newton removal, and the margin edit from there.
* Sequences: an ascent of the network (:mod:`imu_fast.unlearning.auto_sequences`).

Without a stop rule or ``unseen`` samples go to forget accuracy zero with a warning that asks for a
depth: a model that never saw them predicts them as well as other unseen data, and flipping all
ruins much. Sequences need a depth.

What the features know of the forgotten may remain, as the probe and the relearning steps of a
comparison show. Where that matters, ``method="npo", scope="all"`` or retraining is what there is.
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
from imu_fast.model.convolution import scored_layers
from imu_fast.model.head import resolve
from imu_fast.model.outputs import measured
from imu_fast.model.reading import Reading
from imu_fast.options import option, options
from imu_fast.unlearning import auto_sequences
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.ascent.objectives import SimNPO
from imu_fast.unlearning.ascent.optimizer import SGD
from imu_fast.unlearning.ascent.scopes import Head
from imu_fast.unlearning.depth import Depths, StopRule
from imu_fast.unlearning.edit.distillation import SelfDistillation, movable_layers, why_no_head
from imu_fast.unlearning.edit.margin_edit import MarginEdit
from imu_fast.unlearning.edit.newton import NewtonRemoval
from imu_fast.unlearning.head_weight import HeadWeight
from imu_fast.unlearning.left_alone import LeftAlone, no_better
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import check_head_layer, naming
from imu_fast.unlearning.summary.summary import TrainingSummary, check_summary


def single_row() -> Ascent:
    """Ascent of the forgotten classes' rows of the head alone; for forgetting a class."""
    return Ascent(scope=Head(rows="forgotten"))


logger = logging.getLogger("imu_fast")

_NAMES = (
    "pass unseen=X, X the model's accuracy on data that it never saw, such as 0.71, or a loader of "
    "such data; or another depth, such as stop=imu_fast.StopRule(forget_accuracy=0.5)"
)


_INSIST = (
    "a depth, as stop=imu_fast.StopRule(forget_accuracy=...) or --stop-accuracy, makes it forget "
    "all the same"
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
# Why a method is taken, by its name and whether there is a summary: docs/recipes.md.
_WHY: dict[tuple[str, bool], str] = {
    ("single_row", False): _ROW,
    ("single_row", True): f"{_ROW}; a summary made none of the recipes nearer",
    ("self_distillation", False): "nearest to retraining of those that need no summary",
    ("self_distillation", True): "nearest to retraining of those that use no retain data",
    ("margin_edit", False): "the smallest edit that reaches the depth",
    ("newton_removal", True): "with the margin edit after it the smallest edit from there",
}
# Chosen on development models. k is 1 by the derivation where features stay; those of a retrained
# network do not.
_K, _MARGIN = 2.0, 0.5
# Below this p-value the forget set is predicted better than unseen data.
_LEVEL = 0.1


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
    summary.check_head(model, theta, len(layers) == 1 and layers[0].bias is not None, forget)


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
            it never saw, or such data, as ``StopRule(unseen_accuracy=...)``. Where the forget set's
            is not above it (p >= 0.1 by Fisher's exact test, one-sided; of a number alone by the
            binomial), the model is left alone, ``result.settings["auto"]`` says so, and a stop rule
            makes it forget all the same.
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

    def _candidates(self, as_unseen: bool = False) -> dict[str, Method]:
        """as_unseen: whether the depth is the accuracy on unseen data."""
        # A single row moves no other class, so its step may be large: bisection finds the depth.
        large = Ascent(scope=Head(rows="forgotten"), optimizer=SGD(lr=1.0), epochs=1000)
        removal = NewtonRemoval()
        if self.summary is not None:
            then: Any = {"then": "margin_edit", "k": _K, "margin": _MARGIN}
            removal = NewtonRemoval(summary=self.summary, **then)
        return {
            "single_row": large,
            "margin_edit": MarginEdit(margin=_MARGIN) if as_unseen else MarginEdit(),
            "newton_removal": removal,
            "self_distillation": SelfDistillation(
                summary=self.summary, calibrated=self.summary is not None
            ),
            "left_alone": LeftAlone(),
            "sequences": Ascent(objective=SimNPO()),
        }

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Its own options, and those of whichever method is taken."""
        found = {name: way for m in self._candidates().values() for name, way in m.paths().items()}
        # There once retain= is.
        kept = {name: ("retain", name) for name in ("retain_loss", "retain_weight")}
        return {**{name: (name,) for name in _OWN}, **found, **kept}

    def flat(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _OWN}, **(self.given or {})}

    def with_options(self, described: str, given: Mapping[str, Any]) -> Self:
        for name in given:
            if name in _OWN:
                continue
            if name not in self.paths() and name not in Ascent.shorthands:
                raise InputError(self._unknown(described, name, self))
        own = {name: given.get(name, getattr(self, name)) for name in _OWN}
        rest = {name: value for name, value in given.items() if name not in _OWN}
        return type(self)(**own, given={**(self.given or {}), **rest})

    def task_of(self, labels: Tensor, classes: int) -> Task:
        """Of these forget labels [n]."""
        whole = self.unseen is None and is_class(labels, classes)
        return self.task or ("class" if whole else "samples")

    def edit_of(self, task: Task) -> tuple[str, Method]:
        """What is taken to a depth that is not the accuracy on unseen data, its name before it.

        Raises:
            InputError: an option that the method does not have.
        """
        return self._named("single_row" if task == "class" else self._edit)

    @property
    def _edit(self) -> str:
        return "margin_edit" if self.summary is None else "newton_removal"

    def _named(self, name: str, as_unseen: bool = False) -> tuple[str, Method]:
        method, given = self._candidates(as_unseen)[name], self.given or {}
        if name == "left_alone":
            return name, method
        if name == "self_distillation":  # its layers are others than the head, which it finds
            given = {k: v for k, v in given.items() if k not in ("layers", "layer")}
        described = f"method='auto' takes {name!r} for these samples, which"
        return name, method.with_options(described, given)

    def _check_given(self, edit: str) -> None:
        """Raise InputError for options that neither method has that could have been taken."""
        try:
            self._named("self_distillation", as_unseen=True)
        except InputError as error:
            try:
                self._named(edit, as_unseen=True)
            except InputError:
                raise error from None

    def _taken(self, task: Task, name: str, depths: Depths, why: str = "") -> Taken:
        why = why or _WHY[name, self.summary is not None]
        logger.info("auto takes %s for %s: %s", name, task, why)
        as_unseen = all(rule.unseen_accuracy is not None for rule in depths.rules)
        return Taken(*self._named(name, as_unseen), depths, why)

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
        """The method, by the forget set's labels and the model's logits; and how deep.

        Raises:
            InputError: an option that the method does not have; ``unseen`` beside a stop rule, or
                for a class; a summary of another model.
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
        task = self.task_of(labels, classes)
        if self.summary is not None:
            _check_of(self.summary, model, names, len(labels))
        if task == "samples" and any(rule.forget_accuracy == 0 for rule in depths.rules):
            _warn_of_ruin("forget_accuracy=0", stacklevel=5)
        asked = bool(depths.rules)
        if not asked:
            depths = Depths(self.depth(labels, classes, task))
        if task == "class":
            return self._taken(task, "single_row", depths)
        edit = self._edit
        if not all(rule.unseen_accuracy is not None for rule in depths.rules):
            return self._taken(task, edit, depths)
        depths, count = self._measured(model, reading, depths)
        own = measured(model, forget, reading, "unlearn()")
        right, n = int(own.correct.sum()), len(own.correct)
        line = depths.rules[-1].accuracy
        assert line is not None
        p = no_better(right, n, line, count)
        if p >= _LEVEL:
            told = (
                f"{right} of {n} forget samples are right ({right / n:.3f}), which is not above "
                f"the {line:.3f} of unseen data as far as these can tell (p = {p:.2g})"
            )
            if asked:
                return self._taken(task, edit, depths, f"{told}, and a depth was named: {edit}")
            self._check_given(edit)
            told = f"{told}: the model is left alone, as retraining is expected to; {_INSIST}"
            return self._taken(task, "left_alone", Depths(), told)
        if why_not := self._why_no_distillation(model, forget, reading, names, classes):
            why = f"{_WHY[edit, self.summary is not None]}; no self-distillation: {why_not}"
            return self._taken(task, edit, depths, why)
        return self._taken(task, "self_distillation", depths)

    def _measured(
        self, model: nn.Module, reading: Reading, depths: Depths
    ) -> tuple[Depths, int | None]:
        """Depths as numbers, and on how many samples the last was measured, where that is known."""
        counts: list[int | None] = [None]

        def accuracy_on(unseen: Any) -> float:
            with naming("(unseen)"):
                found = measured(model, unseen, reading, "unlearn()")
            counts.append(len(found.loss))
            return found.accuracy

        kept = self.summary if self.unseen is None and self.summary is not None else None
        depths = depths.measured(accuracy_on)
        if kept is not None and depths.rules[-1].unseen_accuracy == kept.unseen_accuracy:
            return depths, kept.unseen_count
        return depths, counts[-1]

    def _why_no_distillation(
        self,
        model: nn.Module,
        forget: ForgetSet,
        reading: Reading,
        names: list[str],
        classes: int,
    ) -> str:
        """Empty if there are layers before the one head that can be captured."""
        if len(names) > 1:
            return "the logits are made of several heads"
        if why := why_no_head(model, resolve(model, names[0])):
            return f"the head {names[0]!r} {why}"
        if self.summary is not None:
            there = scored_layers(model)
            if other := [name for name in self.summary.inner if name not in there]:
                return f"the model has no layer {other[0]!r}, which the summary is of"
        read = model, forget, reading
        if not movable_layers(read, names, None, self.summary, classes):
            what = "in the summary" if self.summary is not None else "that can be captured"
            return f"there is no layer before the head {what}"
        return ""

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
        why = auto_sequences.why(kept, given)
        logger.info("auto takes %s for sequences: %s", name, why)
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
