"""Reweighted gradient ascent, as an object with its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn
from typing_extensions import Self

from imu_fast.errors import check_choice, check_count, check_positive
from imu_fast.model.batches import ForgetSet
from imu_fast.options import Choice, option, options
from imu_fast.unlearning.ascent.objectives import OBJECTIVES, Objective, ObjectiveName, Relabel
from imu_fast.unlearning.ascent.optimizer import OPTIMIZERS, Optimizer, OptimizerName
from imu_fast.unlearning.ascent.retain import ASCENDED, RETAIN, RETAINS, Retain, Retained
from imu_fast.unlearning.ascent.run import Run
from imu_fast.unlearning.ascent.scopes import PAPER_LAYERS, SCOPES, Layers, Scope, ScopeName
from imu_fast.unlearning.ascent.step import Rule
from imu_fast.unlearning.ascent.weights import WEIGHTS, Influence, Weights, WeightsName
from imu_fast.unlearning.identity import of_forget_set
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.subject import naming


def _check_limit(name: str, value: int | None) -> None:
    if value is not None:
        check_count(name, value)


def _check_not_negative(name: str, value: float) -> None:
    check_positive(name, value, allow_zero=True)


def _check_record(name: str, value: str | None) -> None:
    if value is not None:
        check_choice(name, value, ("epoch", "step", "ends"))


def _paper(ascent: Ascent, preset: object) -> Ascent:
    """The authors' code as it behaves: see ``preset`` of :func:`imu_fast.unlearn`."""
    check_choice("preset", preset, ("paper",))
    weights = ascent.weights
    if isinstance(weights, Influence):
        weights = replace(weights, top_fraction=0.1, scored="trained")
    scope = Layers(layers=PAPER_LAYERS, batchnorm="train", dropout="train")
    return replace(ascent, weights=weights, scope=scope, alpha=0.2)


@options
class Ascent(Method):
    """Gradient ascent on the forget set, step by step.

    Minimises ``- sum_i w_i f(l_i) / sum_i w_i + alpha ||theta||_1`` per batch.

    Args:
        weights: how much each sample weighs: ``Uniform()``, ``Influence(...)``, ``Permuted(...)``,
            ``LossWeights(...)``.
        objective: f: ``"ce"``, ``"margin"``, ``"log1mp"``, ``"npo"``, ``"simnpo"``, ``"relabel"``,
            ``"refusal"``; of a sequence the mean over its tokens, unless it says otherwise.
        scope: what changes: ``Head(...)``, ``Layers(...)``, ``Network(...)``.
        optimizer: ``SGD(...)``, a class out of ``torch.optim``, or a function that makes an
            optimizer of a list of tensors.
        retain: data that is to stay, or ``Retain(...)``; without, nothing of it is needed.
        epochs, max_steps: the budget; whichever is used up first.
        batch_size: forget samples per step.
        alpha: weight of the L1 norm of the trained parameters.
        record: when the trajectory gets an entry, which is a measurement of every watched set:
            each ``"epoch"``, each ``"step"``, or at the ``"ends"``, before and after. None: each
            epoch where somebody looks on (``callback=``, ``watch=``), else at the ends.
    """

    name = "ascent"
    resumable = True
    shorthands = {"preset": _paper}  # noqa: RUF012  # frozen like the class

    weights: Choice[Weights, WeightsName] = Choice(WEIGHTS, "uniform")
    objective: Choice[Objective, ObjectiveName] = Choice(OBJECTIVES, "ce")
    scope: Choice[Scope, ScopeName] = Choice(SCOPES, "head")
    optimizer: Choice[Optimizer, OptimizerName] = Choice(OPTIMIZERS, "sgd")
    retain: Choice[Retained, str] = Choice(RETAINS, "none")
    epochs: int = option(default=10, check=check_count)
    max_steps: int | None = option(default=None, check=_check_limit)
    batch_size: int = option(default=256, check=check_count)
    alpha: float = option(default=0.0, check=_check_not_negative)
    record: Literal["epoch", "step", "ends"] | None = option(default=None, check=_check_record)

    @property
    def sequences(self) -> bool:
        """All but what moves floating inputs."""
        return not (isinstance(self.objective, Relabel) and self.objective.target == "nearest")

    @property
    def batches_of(self) -> int:
        return self.batch_size

    def bind(self, model: nn.Module) -> Self:
        return replace(self, scope=self.scope.bind(model))

    def run(self, job: Job) -> UnlearnResult:
        retain = self.retain if isinstance(self.retain, Retain) else None
        if retain is not None:
            with naming(RETAIN):
                job.sets[RETAIN] = ForgetSet(retain.data, self.batch_size, job.model)
            if job.checkpoint is not None:
                job.belongs |= of_forget_set("set 'retain'", job.sets[RETAIN])
        samples, name = self.objective.samples(job, self.batch_size), "forget"
        if samples is not job.forget:
            name = ASCENDED
            job.sets[name] = samples
        auxiliary = self.objective.auxiliary(job)
        rule = Rule(self.objective, auxiliary, self.alpha, self.optimizer, retain, name)
        steps = self.scope.steps(job, rule)
        return Run(self, steps, job).ascend()
