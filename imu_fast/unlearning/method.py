"""What a method of unlearning is, and the job that it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from imu_fast.model.batches import ForgetSet
from imu_fast.model.guard import Kept, copies_of
from imu_fast.model.reading import Reading
from imu_fast.options import Options
from imu_fast.unlearning.depth import Depths
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.trajectory import Callback


@dataclass
class Job:
    """One call of :func:`imu_fast.unlearn`: everything but the method.

    Attributes:
        model: what is changed. forget: what it is to forget.
        sets: every set that is measured: "forget", "unseen" where a rule needs it, the watched.
        watch: names of the sets that are recorded.
        belongs: what a checkpoint says that it is of, by name.
        reading: how the model is read. sequences: whether samples have labels at positions.
        kept: tensors that change, with copies, put back on any failure.
    """

    model: nn.Module
    forget: ForgetSet
    sets: dict[str, Any]
    watch: list[str]
    depths: Depths
    callback: Callback | None
    checkpoint: Path | None
    resume: bool
    seed: int
    progress: bool
    belongs: dict[str, Any]
    reading: Reading = field(default_factory=Reading)
    sequences: bool = False
    kept: Kept = field(default_factory=list)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Have these tensors put back if the run fails; before they change."""
        self.kept += copies_of(tensors)


class Method(Options, ABC):
    """One way of forgetting: a frozen object that holds exactly the options that it uses."""

    # Whether a run has epochs that a checkpoint can be written after.
    resumable = False

    @property
    def sequences(self) -> bool:
        """Whether it forgets sequences, and not only samples of one label."""
        return False

    @property
    def batches_of(self) -> int:
        """Forget samples that go through the model at once."""
        return 256

    def bind(self, model: nn.Module) -> Self:
        """This method with the model's layers by name, all of them there.

        Raises:
            InputError: a layer that the model does not have.
        """
        return self

    @abstractmethod
    def run(self, job: Job) -> UnlearnResult:
        """Change the model of ``job``; whatever fails, the caller puts ``job.kept`` back."""
