"""What an experiment on a language model has to say: its data, its depth, its measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from imu_fast.study.cells import Json
from imu_fast.study.language.models import Network
from imu_fast.study.language.sequences import Sequences
from imu_fast.study.report.blocks import Metric
from imu_fast.unlearning.depth import StopRule


@dataclass(frozen=True)
class Material:
    """The data of one seed.

    Attributes:
        forget: what is to be forgotten. kept: what else a model is trained on.
        validation: of the kept kind, never trained on: the learning rates are chosen by it.
        sets: what is measured, by name.
        network: of this size for these data.
        more: what else the measures need.
    """

    forget: Sequences
    kept: Sequences
    validation: Sequences
    sets: Mapping[str, Sequences]
    network: Network
    more: Any = None

    @property
    def everything(self) -> Sequences:
        """What the original is trained on."""
        return Sequences.joined([self.kept, self.forget])

    def fingerprint(self) -> list[str]:
        """Of every part."""
        parts = (self.forget, self.kept, self.validation, *self.sets.values())
        return [part.fingerprint() for part in parts]


Measure = Callable[[nn.Module], Json]


@dataclass(frozen=True)
class Experiment(ABC):
    """Settings of one; each is frozen and can be sent to another process.

    Attributes:
        max_steps: budget of a run on the whole network; of one on the head it is three times that.
        batch_size: forget sequences a step.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    # What a run stops at, in words.
    depth: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    # Metric -> a difference that is too small to matter; these are tested.
    margins: ClassVar[Mapping[str, float]]

    max_steps: int = 90
    batch_size: int = 64

    @abstractmethod
    def material(self, seed: int) -> Material:
        """The data of a seed."""

    @abstractmethod
    def stop(self, retrained: Callable[[], nn.Module], material: Material) -> StopRule:
        """The depth, the same for every method; ``retrained`` makes the reference, if asked."""

    @abstractmethod
    def measure(
        self, material: Material, original: nn.Module, retrained: nn.Module, seed: int
    ) -> Measure:
        """What measures a model of this seed: metrics by name."""

    def references(self, material: Material, measure: Measure) -> dict[str, Json]:
        """What else is no method, by name: its metrics."""
        return {}

    @abstractmethod
    def settings(self) -> Json:
        """All that the numbers depend on beside the data, for JSON."""
