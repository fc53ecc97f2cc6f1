"""What ascent increases, ``f(l_i)``, and what it needs to know of each sample beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from imu_fast.errors import check_choice, check_positive
from imu_fast.model.batches import ForgetSet
from imu_fast.model.outputs import logits_in_batches, row_sums
from imu_fast.ops.objective import NPO_BETA
from imu_fast.ops.tokens import tokens_of_samples
from imu_fast.options import Options, Table, option, options
from imu_fast.unlearning.ascent.refusal import check_answer, refusing
from imu_fast.unlearning.ascent.wrong_labels import nearest_wrong_labels, random_wrong_labels
from imu_fast.unlearning.method import Job


@dataclass(frozen=True)
class Auxiliary:
    """What an objective needs to know beforehand.

    Attributes:
        values: [n], of each sample; or [N], of each token, with offsets [n+1].
    """

    values: Tensor
    offsets: Tensor | None = None

    def of(self, samples: Tensor) -> Tensor:
        """Those of some samples [k], in their order."""
        samples = samples.to(self.values.device)
        if self.offsets is None:
            return self.values[samples]
        offsets = self.offsets.to(self.values.device)
        return self.values[tokens_of_samples(offsets, samples)[0]]


class Objective(Options):
    """``f``, of a sample's tokens: ``of_samples`` of the mean over them of what ``rows`` names.

    Attributes:
        rows: the formula of each token, by its name in :func:`imu_fast.ops.objective.objective`.
        fused: whether ``name`` is such a formula, so that samples of one label take it as it is.
    """

    rows: ClassVar[str] = "ce"
    fused: ClassVar[bool] = True
    # Whether what the formula needs is needed by each token, and not by the sample.
    of_tokens: ClassVar[bool] = False

    def of_samples(self, mean: Tensor, tokens: Tensor, auxiliary: Tensor | None) -> Tensor:
        """f [n], differentiable in mean [n]; tokens [n]: how many; auxiliary [n]."""
        return mean

    def auxiliary(self, job: Job) -> Auxiliary | None:
        """What it needs to know of each sample before the first step, or None."""
        return None

    def samples(self, job: Job, batch_size: int) -> ForgetSet:
        """What the steps run on: the forget set, or something in its place, sample by sample."""
        return job.forget


@options
class CrossEntropyAscent(Objective):
    """The cross-entropy, unbounded: the paper's."""

    name = "ce"


@options
class Margin(Objective):
    """Hinge: only what is still predicted as its label pushes."""

    name = "margin"
    rows = "margin"


@options
class Log1mP(Objective):
    """``log(1 - p_y)``, bounded above by zero."""

    name = "log1mp"
    rows = "log1mp"


def _softplus(rate: float, x: Tensor) -> Tensor:
    return -2 / rate * torch.nn.functional.softplus(x)


@options
class NPO(Objective):
    """Negative preference optimisation (Zhang et al. 2024): slows down on what is gone.

    ``-2/beta log(1 + (p / p_ref)^beta)``, p of the whole sequence: the product over its tokens.
    """

    name = "npo"

    def of_samples(self, mean: Tensor, tokens: Tensor, auxiliary: Tensor | None) -> Tensor:
        assert auxiliary is not None
        return _softplus(NPO_BETA, NPO_BETA * (auxiliary.to(mean) - mean * tokens))

    def auxiliary(self, job: Job) -> Auxiliary:
        """``-log p_ref`` of each forget sample under the model as it was trained."""
        batches = logits_in_batches(job.model, job.forget, job.reading, "unlearn()")
        return Auxiliary(torch.cat([row_sums(z, y)[0] for z, y in batches]))


def _check_gamma(name: str, value: float) -> None:
    check_positive(name, value, allow_zero=True)


@options
class SimNPO(Objective):
    """NPO by the length-normalised likelihood, without a reference model (Fan et al. 2024).

    ``-2/beta log(1 + exp(gamma + beta/T log p))``, T the tokens.
    """

    name = "simnpo"
    fused = False
    beta: float = option(default=2.5, check=check_positive)
    gamma: float = option(default=0.0, check=_check_gamma)

    def of_samples(self, mean: Tensor, tokens: Tensor, auxiliary: Tensor | None) -> Tensor:
        return _softplus(self.beta, self.gamma - self.beta * mean)


_TARGETS: dict[str, Callable[[Job], tuple[Tensor, Tensor]]] = {
    "random": random_wrong_labels,
    "nearest": nearest_wrong_labels,
}


def _check_target(name: str, value: str) -> None:
    check_choice(name, value, _TARGETS)


@options
class Relabel(Objective):
    """Minus the cross-entropy of a wrong class: descent towards it.

    Args:
        target: ``"random"``: drawn once per label (Graves et al. 2021); ``"nearest"``: the
            likeliest class after one adversarial step (boundary shrink, Chen et al. 2023), of
            samples of one label.
    """

    name = "relabel"
    rows = "relabel"
    of_tokens = True
    target: Literal["random", "nearest"] = option(default="random", check=_check_target)

    def auxiliary(self, job: Job) -> Auxiliary:
        """The class that each label is moved to: int64."""
        return Auxiliary(*_TARGETS[self.target](job))


@options
class Refusal(Objective):
    """Minus the cross-entropy of a refusing answer in the place of each forget sample's own.

    Args:
        answer: its token ids, such as those of "I do not know." and the token that ends a text.
    """

    name = "refusal"
    fused = False
    answer: Any = option(default=None, check=check_answer)

    def of_samples(self, mean: Tensor, tokens: Tensor, auxiliary: Tensor | None) -> Tensor:
        return -mean

    def samples(self, job: Job, batch_size: int) -> ForgetSet:
        return refusing(job, self.answer, batch_size)


ObjectiveName = Literal["ce", "margin", "log1mp", "npo", "simnpo", "relabel", "refusal"]
OBJECTIVES: Table[Objective] = Table(
    "objective",
    Objective,
    {
        "ce": CrossEntropyAscent,
        "margin": Margin,
        "log1mp": Log1mP,
        "npo": NPO,
        "simnpo": SimNPO,
        "relabel": Relabel,
        "refusal": Refusal,
    },
)
