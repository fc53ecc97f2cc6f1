"""Any method on one model and one task, at matched depth, measured from every side."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import check_installed
from imu_fast.evaluation.metrics import distance, membership
from imu_fast.evaluation.shallowness import linear_probe, relearning_steps
from imu_fast.influence.scores import influence_scores
from imu_fast.model.capture import capture_features
from imu_fast.model.head import find_head
from imu_fast.model.outputs import Outputs
from imu_fast.study.data.tasks import ForgetTask, Samples, take
from imu_fast.study.entries import Entry
from imu_fast.unlearning.depth import StopRule
from imu_fast.unlearning.result import DivergedError
from imu_fast.unlearning.unlearn import unlearn

DEPTHS = {
    "accuracy": "forget accuracy: 0 for a class; half of what it was for a random set",
    "auc": "membership AUC 0.5: confidence tells forget from held-out images no better than chance",
}
METRICS = (
    "forget_accuracy",
    "forget_loss",
    "retain_accuracy",
    "test_accuracy",
    "auc",
    "ks",
    "svc",
    "w1",
    "kl",
    "agreement",
    "relearn",
    "probe",
)
# Retain images that accuracies are measured on, and that trajectories watch.
_RETAIN, _WATCHED = 3000, 300
# Held-out images that the stop rule by AUC compares with.
_UNSEEN = 500
# "Relearned" is this much of the forget accuracy before unlearning.
_RELEARNED = 0.9


@dataclass(frozen=True)
class Seen:
    """What one model makes of every set of a task.

    Attributes:
        head: the classifier. features: its inputs ``(x [n, d], y [n])`` by set. outputs: of them.
    """

    head: nn.Linear
    features: Mapping[str, Samples]
    outputs: Mapping[str, Outputs]

    @classmethod
    def through(cls, head: nn.Linear, features: Mapping[str, Samples]) -> Seen:
        """By a head, on features that are there."""
        with torch.no_grad():
            outputs = {name: Outputs(head(x), y) for name, (x, y) in features.items()}
        return cls(copy.deepcopy(head), features, outputs)


@dataclass(frozen=True)
class Reached:
    """A run at one depth: the model as seen there, and what it took."""

    seen: Seen
    steps: float
    seconds: float


class Setting:
    """One trained model and one task.

    Args:
        retrained: the model that never saw the forget set, the reference. None: learning rates are
            to be chosen, by validation images; those of the report are then not touched.
    """

    def __init__(
        self, model: nn.Module, task: ForgetTask, retrained: nn.Module | None, seed: int
    ) -> None:
        self.model, self.task, self.seed = model, task, seed
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(task.retain[1]), generator=generator)
        near = task.unseen_validation
        self.sets: dict[str, Samples] = {
            "forget": task.forget,
            "watched": take(task.retain, rows[:_WATCHED]),
            "near": (near[0][:_UNSEEN], near[1][:_UNSEEN]),
        }
        if retrained is None:
            self.sets["validation"] = task.validation
        else:
            self.sets["retain"] = take(task.retain, rows[:_RETAIN])
            self.sets |= {"test": task.test, "unseen": task.unseen_test}
        self.original = self.see(model)
        self.retrained = None if retrained is None else self.see(retrained)

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

    def milestones(self, sets: Mapping[str, Samples] | None = None) -> dict[str, StopRule]:
        """The depths at which methods are compared on this task, see ``DEPTHS``."""
        unseen = (sets or self.sets)["near"]
        if self.task.kind == "class":
            return {"accuracy": StopRule(forget_accuracy=0.0)}
        return {
            "accuracy": StopRule(forget_accuracy=self.original.outputs["forget"].accuracy / 2),
            "auc": StopRule(membership_auc=0.5, unseen=unseen),
        }

    def run(
        self, entry: Entry, lr: float, max_steps: int
    ) -> tuple[dict[str, Reached], list[tuple[float, float]]]:
        """Unlearn by one method to every depth, within its budget out of ``max_steps``.

        Returns:
            What was reached by depth, and the way there: (forget, retain) accuracy after each step.

        Raises:
            DivergedError: the learning rate is too large for this method.
        """
        on_head = entry.scope == "head"
        sets = self.original.features if on_head else self.sets
        model = copy.deepcopy(nn.Sequential(self.original.head) if on_head else self.model)
        found: dict[str, Reached] = {}
        started = time.perf_counter()

        def at_depth(depth: str, record: dict[str, float]) -> None:
            seconds = time.perf_counter() - started
            if on_head:
                seen = Seen.through(find_head(model)[1], sets)
            else:
                seen = self.see(model)
            found[depth] = Reached(seen, record["step"], seconds)

        budget = entry.budget(max_steps)
        result = unlearn(
            model,
            sets["forget"],
            milestones=self.milestones(sets),
            on_milestone=at_depth,
            watch={"retain": sets["watched"]},
            seed=self.seed,
            **entry.taking(
                sets["forget"][1].cpu(),
                self.original.head.out_features,
                lr=lr,
                epochs=budget,  # each has a step at least
                max_steps=budget,
                record="step" if on_head else "epoch",
                on_empty="uniform",
            ),
        )
        way = [(r["forget_accuracy"], r["retain_accuracy"]) for r in result.trajectory]
        return found, way

    def choose_rate(self, entry: Entry, max_steps: int) -> float | None:
        """The learning rate with the best validation accuracy, the mean over this task's depths.

        A depth counts as zero unless it is reached within a third of the budget. None: the method
        reaches none at any rate.
        """
        best, chosen = 0.0, None
        patience = entry.budget(max_steps) / 3
        for lr in entry.rates:
            try:
                found, _ = self.run(entry, lr, max_steps)
            except DivergedError:
                continue
            usable = [reached for reached in found.values() if reached.steps <= patience]
            total = sum(reached.seen.outputs["validation"].accuracy for reached in usable)
            if total > best:
                best, chosen = total, lr
            if best and not usable:
                break  # smaller steps are slower still
        return chosen

    def measure(self, seen: Seen) -> dict[str, float]:
        """``METRICS``: depth, utility, distance to the retrained model, shallowness."""
        outputs = seen.outputs
        row = {
            "forget_accuracy": outputs["forget"].accuracy,
            "forget_loss": outputs["forget"].mean_loss,
            "retain_accuracy": outputs["retain"].accuracy,
            "test_accuracy": outputs["test"].accuracy,
        }
        kept = (outputs[name] for name in ("forget", "retain", "unseen"))
        row |= membership(*kept, seed=self.seed)
        if self.retrained is not None:
            row |= distance(outputs["forget"], self.retrained.outputs["forget"])
        target = _RELEARNED * self.original.outputs["forget"].accuracy
        head = nn.Sequential(seen.head)
        row["relearn"] = relearning_steps(
            head, seen.features["forget"], target=target, seed=self.seed
        )
        # The head's methods share their features, and so the probe.
        shared = seen.features is self.original.features
        row["probe"] = self._probe_of_original if shared else self._probe(seen)
        return row

    @cached_property
    def _probe_of_original(self) -> float:
        return self._probe(self.original)

    def _probe(self, seen: Seen) -> float:
        forget, retain = seen.features["forget"], seen.features["retain"]
        features, labels = (torch.cat(pair) for pair in zip(forget, retain, strict=True))
        return linear_probe(
            features, labels, torch.arange(len(labels)) < len(forget[1]), seed=self.seed
        )

    def correlations(self, damping: float = 1e-2) -> dict[str, float]:
        """Spearman correlation of every curvature's influence with the exact one (``ggn``)."""
        check_installed("correlations()", "scipy")
        from scipy.stats import spearmanr

        head = nn.Sequential(self.original.head)
        scores: dict[str, Tensor] = {}
        for name in CURVATURES:
            has_damping = "damping" in CURVATURES[name].paths()
            spec = CURVATURES.choose(name, damping=damping if has_damping else None)
            scores[name] = influence_scores(head, self.original.features["forget"], curvature=spec)
        exact = scores.pop("ggn")
        scores["-loss"] = -self.original.outputs["forget"].loss
        pairs = {name: (s.double().numpy(), exact.double().numpy()) for name, s in scores.items()}
        return {name: float(spearmanr(*pair).statistic) for name, pair in pairs.items()}
