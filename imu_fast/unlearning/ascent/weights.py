"""How much each forget sample weighs in the ascent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature
from imu_fast.curvature.named import CURVATURES, CurvatureName
from imu_fast.errors import check_choice, check_fraction
from imu_fast.influence.scores import influence_scores
from imu_fast.influence.weights import QUANTILE_OVER, influence_weights
from imu_fast.options import Choice, Options, Table, option, options
from imu_fast.unlearning.subject import Scored


def by_index(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A selection in the order of its indices: that of magnitudes follows the scores' rounding."""
    ordered, places = indices.sort()
    return ordered, weights[places.to(weights.device)]


def _check_reweight(name: str, value: str) -> None:
    check_choice(name, value, ("once", "epoch", "batch"))


def _check_empty(name: str, value: str) -> None:
    check_choice(name, value, ("error", "uniform"))


def _check_scored(name: str, value: str) -> None:
    check_choice(name, value, ("head", "trained"))


def _check_quantile(name: str, value: str) -> None:
    check_choice(name, value, QUANTILE_OVER)


class Weights(Options, ABC):
    """Which forget samples are ascended, and their weights.

    Attributes:
        reweight: when they are computed: ``"once"``, each ``"epoch"``, or each ``"batch"`` of its
            own samples (a batch without negative scores is skipped).
        scored: the layers that scores are of: the ``"head"``, or all linear layers and convolutions
            that are ``"trained"``.
    """

    reweight: str = "once"
    scored: str = "head"

    def scores(self, subject: Scored, rows: Tensor | None = None) -> Tensor | None:
        """What weights are made of: [n], negative supports forgetting; None: all weigh alike.

        Args:
            rows: which forget samples; None: all.
        """
        return None

    @abstractmethod
    def weigh(self, scores: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Indices [k] and weights [k] out of scores [n]."""


@options
class Uniform(Weights):
    """Every forget sample alike: plain gradient ascent (Thudi et al. 2022)."""

    name = "uniform"

    def weigh(self, scores: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        return torch.arange(len(scores)), torch.ones_like(scores)


class _Selected(Weights):
    """Weights by :func:`imu_fast.influence_weights`."""

    top_fraction: float
    clip_quantile: float
    on_empty: str
    # Losses are hardly ever zero, so of theirs the kept ones are all.
    quantile_over: str = "kept"
    _permute = False

    def weigh(self, scores: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        return influence_weights(
            scores,
            self.top_fraction,
            self.clip_quantile,
            quantile_over=self.quantile_over,
            on_empty=self.on_empty,
            permute=self._permute,
            seed=seed,
        )


@options
class Influence(_Selected):
    """IMU (arXiv 2508.01620): the root of the influence at the classifier.

    Args:
        curvature: and its options, see :func:`imu_fast.influence_scores`.
        top_fraction, clip_quantile, quantile_over, on_empty: of
            :func:`imu_fast.influence_weights`.
        first_row_is_mean: a defect of the authors' code, see :func:`imu_fast.influence_scores`.
        scored: the layers of the influence: the ``"head"``, or all linear ones that are trained.
    """

    name = "influence"
    curvature: Choice[Curvature, CurvatureName] = Choice(CURVATURES, "fisher_diag")
    top_fraction: float = option(default=1.0, check=check_fraction)
    clip_quantile: float = option(default=0.93, check=check_fraction)
    quantile_over: Literal["kept", "all"] = option(default="kept", check=_check_quantile)
    on_empty: Literal["error", "uniform"] = option(default="error", check=_check_empty)
    first_row_is_mean: bool = option(default=False)
    scored: Literal["head", "trained"] = option(default="head", check=_check_scored)
    reweight: Literal["once", "epoch", "batch"] = option(default="once", check=_check_reweight)

    def scores(self, subject: Scored, rows: Tensor | None = None) -> Tensor:
        return influence_scores(
            subject.factors(rows, self.scored),
            curvature=self.curvature,
            first_row_is_mean=self.first_row_is_mean,
        )


@options
class Permuted(Influence):
    """IMU's control: the same weights, shuffled among the same samples."""

    name = "permuted"
    _permute = True


@options
class LossWeights(_Selected):
    """IMU's cheapest rival: a sample weighs what its loss is, by IMU's own rule."""

    name = "loss"
    top_fraction: float = option(default=1.0, check=check_fraction)
    clip_quantile: float = option(default=0.93, check=check_fraction)
    on_empty: Literal["error", "uniform"] = option(default="error", check=_check_empty)
    reweight: Literal["once", "epoch", "batch"] = option(default="once", check=_check_reweight)

    def scores(self, subject: Scored, rows: Tensor | None = None) -> Tensor:
        losses: Tensor | None = getattr(subject.factors(rows)[0], "losses", None)
        assert losses is not None  # of the head
        return -losses


WeightsName = Literal["uniform", "influence", "permuted", "loss"]
WEIGHTS: Table[Weights] = Table(
    "weights",
    Weights,  # type: ignore[type-abstract]
    {"uniform": Uniform, "influence": Influence, "permuted": Permuted, "loss": LossWeights},
)
