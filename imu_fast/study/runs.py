"""Any method on one model and one task, at matched depth, measured from every side."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import check_installed
from imu_fast.evaluation.gap import average_gap, random_flips
from imu_fast.evaluation.lira import lira, scaled_confidence
from imu_fast.evaluation.metrics import distance, membership, roc_auc
from imu_fast.evaluation.shallowness import linear_probe, relearning_steps
from imu_fast.influence.scores import influence_scores
from imu_fast.model.capture import capture_features
from imu_fast.model.head import find_head
from imu_fast.model.outputs import Outputs, outputs_of
from imu_fast.study.data.tasks import ForgetTask, Samples, take
from imu_fast.study.entries import Entry
from imu_fast.unlearning.depth import StopRule
from imu_fast.unlearning.result import DivergedError
from imu_fast.unlearning.unlearn import unlearn

DEPTHS = {
    "zero": "a class: no image of it is classified right any more, as after retraining",
    "unseen": "random images: forget accuracy has come down to the original model's own accuracy "
    "on calibration images that it never saw, which are disjoint from the test images; a depth "
    "that a user can name",
    "half": "stress test, random images: half of the forget images that were right are wrong; "
    "retraining does not go there",
}
# The depths of a kind of task, and of a stop between its start and the first of them, which is
# measured for the figures alone.
KINDS = {"class": ("zero",), "random": ("unseen", "half")}
_ON_THE_WAY = "way"
# The depth that retraining does not reach: what is nearest to retraining there says nothing.
STRESS = "half"
_SETS = ("forget", "retain", "test")
_DISTANCES = tuple(f"{name}_{on}" for name in ("kl", "w1", "agreement") for on in _SETS)
METRICS = (
    "gap",
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "membership",
    *_DISTANCES,
    "forget_loss",
    "auc",
    "ks",
    "lira",
    "relearn",
    "probe",
)
# What membership attacks are to tell apart.
_TOLD = ("forget", "unseen")
# Retain images that accuracies are measured on.
_RETAIN = 2000
# Fewer models that were trained on other images say little of how confidence varies over models.
_SHADOWS = 3
# "Relearned" is this much of the forget accuracy before unlearning.
_RELEARNED = 0.9


@dataclass(frozen=True)
class Seen:
    """What one model makes of every set of a task.

    Attributes:
        outputs: by set.
        head, features: the classifier, and its inputs ``(x [n, d], y [n])`` by set; None where
            there is no model behind the outputs (random flips).
    """

    outputs: Mapping[str, Outputs]
    head: nn.Linear | None = None
    features: Mapping[str, Samples] | None = None

    @property
    def model(self) -> tuple[nn.Linear, Mapping[str, Samples]]:
        """The classifier and its inputs, of a model."""
        assert self.head is not None and self.features is not None
        return self.head, self.features

    @classmethod
    def through(cls, head: nn.Linear, features: Mapping[str, Samples]) -> Seen:
        """By a head, on features that are there."""
        with torch.no_grad():
            outputs = {name: Outputs(head(x), y) for name, (x, y) in features.items()}
        return cls(outputs, copy.deepcopy(head), features)


@dataclass(frozen=True)
class Reached:
    """A run at one depth: the model as seen there, and what it took."""

    seen: Seen
    steps: float
    seconds: float


@dataclass(frozen=True)
class Shadow:
    """A model of the same kind, trained on other images, for the likelihood-ratio attack.

    Attributes:
        without: which forget images it was not trained on, a mask [n].
    """

    model: nn.Module
    without: Tensor


class Setting:
    """One trained model and one task.

    Args:
        retrained: the model that never saw the forget set, the reference. None: learning rates are
            to be chosen, by validation images; those of the report are then not touched.
        twin: another such model, a floor.
        shadows: for the likelihood-ratio attack.
    """

    def __init__(
        self,
        model: nn.Module,
        task: ForgetTask,
        retrained: nn.Module | None,
        seed: int,
        *,
        twin: nn.Module | None = None,
        shadows: Sequence[Shadow] = (),
    ) -> None:
        self.model, self.task, self.seed = model, task, seed
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(task.retain[1]), generator=generator)
        self.sets: dict[str, Samples] = {"forget": task.forget}
        if retrained is None:
            self.sets["validation"] = task.validation
        else:
            self.sets["retain"] = take(task.retain, rows[:_RETAIN])
            self.sets |= {"test": task.test, "unseen": task.unseen_test}
        self.original = self.see(model)
        self.unseen_accuracy = outputs_of(model, task.unseen_validation).accuracy
        self.retrained = None if retrained is None else self.see(retrained)
        self._twin, self._shadows = twin, shadows

    @cached_property
    def twin(self) -> Seen | None:
        """Another model that never saw the forget set."""
        return None if self._twin is None else self.see(self._twin)

    def see(self, model: nn.Module) -> Seen:
        """One forward pass over every set."""
        features: dict[str, Samples] = {}
        by_tensor: dict[int, Samples] = {}
        for name, (x, y) in self.sets.items():
            if id(x) not in by_tensor:
                found = capture_features(model, (x, y))
                by_tensor[id(x)] = (found.features, found.labels)
            features[name] = by_tensor[id(x)]
        return Seen.through(find_head(model)[1], features)

    def milestones(self) -> dict[str, StopRule]:
        """The depths at which methods are compared on this task, see ``DEPTHS``."""
        before = self.original.outputs["forget"].accuracy
        lines = {"zero": 0.0, "unseen": self.unseen_accuracy, "half": before / 2}
        return {
            depth: StopRule(unseen_accuracy=lines[depth])
            if depth == "unseen"
            else StopRule(forget_accuracy=lines[depth])
            for depth in KINDS[self.task.kind]
        }

    def run(
        self, entry: Entry, lr: float, max_steps: int, depths: int | None = None
    ) -> tuple[dict[str, Reached], list[tuple[float, float]]]:
        """Unlearn by one method to every depth, within its budget out of ``max_steps``.

        Args:
            depths: how many of the task's depths, the first ones; None: all, and one on the way to
                the first.

        Returns:
            What was reached by depth; and (forget, retain) accuracy on the way, if that was passed.

        Raises:
            DivergedError: the learning rate is too large for this method.
        """
        on_head = entry.scope == "head"
        head, features = self.original.model
        sets = features if on_head else self.sets
        model = copy.deepcopy(nn.Sequential(head) if on_head else self.model)
        milestones = dict(list(self.milestones().items())[:depths])
        if depths is None:
            before = self.original.outputs["forget"].accuracy
            first = next(iter(milestones.values())).accuracy
            assert first is not None
            between = StopRule(forget_accuracy=(before + min(before, first)) / 2)
            milestones = {_ON_THE_WAY: between, **milestones}
        found: dict[str, Reached] = {}
        way: list[tuple[float, float]] = []
        started = time.perf_counter()

        def at_depth(depth: str, record: dict[str, float]) -> None:
            seconds = time.perf_counter() - started
            if depth == _ON_THE_WAY:
                retain = outputs_of(model, sets["retain"]).accuracy
                way.append((record["forget_accuracy"], retain))
                return
            if on_head:
                seen = Seen.through(find_head(model)[1], sets)
            else:
                seen = self.see(model)
            found[depth] = Reached(seen, record["step"], seconds)

        budget = entry.budget(max_steps)
        unlearn(
            model,
            sets["forget"],
            milestones=milestones,
            on_milestone=at_depth,
            seed=self.seed,
            **entry.taking(
                sets["forget"][1].cpu(),
                head.out_features,
                lr=lr,
                epochs=budget,  # each has a step at least
                max_steps=budget,
                on_empty="uniform",
            ),
        )
        return found, way

    def choose_rate(self, entry: Entry, max_steps: int) -> float | None:
        """The learning rate with the best validation accuracy at this task's first depth.

        Of those that get there within a third of the budget. None: none does.
        """
        best, chosen = 0.0, None
        patience = entry.budget(max_steps) / 3
        for lr in entry.rates:
            try:
                found, _ = self.run(entry, lr, max_steps, depths=1)
            except DivergedError:
                continue
            usable = [reached for reached in found.values() if reached.steps <= patience]
            kept = sum(reached.seen.outputs["validation"].accuracy for reached in usable)
            if kept > best:
                best, chosen = kept, lr
            if best and not usable:
                break  # smaller steps are slower still
        return chosen

    def flipped(self, depth: str) -> Seen:
        """The original with forget predictions made wrong at random, as many as the depth asks."""
        line = self.milestones()[depth].accuracy
        assert line is not None
        outputs = dict(self.original.outputs)
        outputs["forget"] = random_flips(outputs["forget"], line, seed=self.seed)
        return Seen(outputs)

    def measure(self, seen: Seen) -> dict[str, float]:
        """``METRICS``: distance to the retrained model, utility, traces, shallowness.

        Without those that need a model where there is none, and without the likelihood-ratio attack
        where too few shadow models are without the images.
        """
        assert self.retrained is not None
        attacks = self._attacks(seen)
        row = _accuracies(seen, attacks)
        row["gap"] = average_gap(row, self._of_retrained)
        for on in _SETS:
            far = distance(seen.outputs[on], self.retrained.outputs[on])
            row |= {f"{name}_{on}": value for name, value in far.items()}
        row["forget_loss"] = seen.outputs["forget"].mean_loss
        row |= {name: attacks[name] for name in ("auc", "ks")}
        row |= self._lira(seen)
        if seen.head is not None:
            head, features = seen.model
            target = _RELEARNED * self.original.outputs["forget"].accuracy
            row["relearn"] = relearning_steps(
                nn.Sequential(head), features["forget"], target=target, seed=self.seed
            )
            # The head's methods share their features, and so the probe.
            shared = features is self.original.features
            row["probe"] = self._probe_of_original if shared else self._probe(features)
        return {name: row[name] for name in METRICS if name in row}

    def _attacks(self, seen: Seen) -> dict[str, float]:
        """An attack that learned on kept classes what is a member, and two of the confidences.

        Held-out images of a forgotten class would be told from any member without a look at
        whether they were trained on.
        """
        sets = (seen.outputs[name] for name in ("forget", "retain", "unseen"))
        return membership(*sets, heldout=seen.outputs["test"], seed=self.seed)

    @cached_property
    def _of_retrained(self) -> dict[str, float]:
        """What every gap is to."""
        assert self.retrained is not None
        return _accuracies(self.retrained, self._attacks(self.retrained))

    @cached_property
    def _shadow_confidences(self) -> Tensor:
        """Of forget, then unseen images: [shadows, n]; NaN where a shadow was trained on it."""
        found = torch.stack(
            [
                torch.cat([scaled_confidence(outputs_of(s.model, self.sets[on])) for on in _TOLD])
                for s in self._shadows
            ]
        )
        without = torch.stack([shadow.without for shadow in self._shadows])
        found[:, : without.shape[1]][~without] = math.nan
        return found

    def _lira(self, seen: Seen) -> dict[str, float]:
        """How well likelihood ratios tell the two sets apart, both in units of one spread."""
        if len(self._shadows) < _SHADOWS:
            return {}
        told = torch.cat([scaled_confidence(seen.outputs[on]) for on in _TOLD])
        scores = lira(told, self._shadow_confidences)
        forget, unseen = scores.tensor_split([len(self.task.forget[1])])
        forget = forget[~forget.isnan()]
        return {"lira": roc_auc(forget, unseen)} if len(forget) else {}

    @cached_property
    def _probe_of_original(self) -> float:
        return self._probe(self.original.model[1])

    def _probe(self, sets: Mapping[str, Samples]) -> float:
        forget, retain = sets["forget"], sets["retain"]
        features, labels = (torch.cat(pair) for pair in zip(forget, retain, strict=True))
        return linear_probe(
            features, labels, torch.arange(len(labels)) < len(forget[1]), seed=self.seed
        )

    def correlations(self, damping: float = 1e-2) -> dict[str, float]:
        """Spearman correlation of every curvature's influence with the exact one (``ggn``)."""
        check_installed("correlations()", "scipy")
        from scipy.stats import spearmanr

        classifier, features = self.original.model
        head = nn.Sequential(classifier)
        scores: dict[str, Tensor] = {}
        for name in CURVATURES:
            has_damping = "damping" in CURVATURES[name].paths()
            spec = CURVATURES.choose(name, damping=damping if has_damping else None)
            scores[name] = influence_scores(head, features["forget"], curvature=spec)
        exact = scores.pop("ggn")
        scores["-loss"] = -self.original.outputs["forget"].loss
        pairs = {name: (s.double().numpy(), exact.double().numpy()) for name, s in scores.items()}
        return {name: float(spearmanr(*pair).statistic) for name, pair in pairs.items()}


def _accuracies(seen: Seen, attacks: Mapping[str, float]) -> dict[str, float]:
    """The four numbers of the average gap."""
    row = {f"{on}_accuracy": seen.outputs[on].accuracy for on in _SETS}
    return row | {"membership": attacks["svc"]}
