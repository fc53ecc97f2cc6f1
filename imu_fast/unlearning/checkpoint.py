"""Checkpoints of an ascent: safetensors files that say what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError, brief
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.unlearning.identity import of_optimizer
from imu_fast.unlearning.result import Record
from imu_fast.unlearning.subject import Subject

# What a resumed run may have otherwise: its budget.
_BUDGET = ("epochs", "max_steps")
_FORMAT = 1
_ANEW = "pass resume=False to overwrite it, or another name"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epochs, step: made so far. indices, weights: [k], of the selection in force.
        scores: [n], before the first step; None where nothing is scored.
        passed: milestones that have been.
        ended: of a run that reached its depth what it was told to reach, why it ended, and the
            fraction kept of its last step.
    """

    epochs: int
    step: int
    records: list[Record]
    batch_losses: list[float]
    indices: Tensor
    weights: Tensor
    scores: Tensor | None
    passed: list[str] = field(default_factory=list)
    ended: tuple[str, str, float] | None = None


def check_resumable(path: Path) -> None:
    """Raise InputError if ``path`` exists and is no checkpoint of a run of ``unlearn``."""
    if not path.exists():
        return
    try:
        metadata = load_tensors(path)[1]
        json.loads(metadata["imu_fast"])
    except (InputError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"checkpoint={str(path)!r} is no checkpoint of unlearn, or is broken "
            f"({brief(error)}); delete it or choose another name"
        ) from error


def _comparable(belongs: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in belongs.items() if k not in _BUDGET}))


class Checkpoint:
    """One file.

    Args:
        subject, optimizer: whose state it holds.
        belongs: what the run is, by name: the method and its options, the model as it was before,
            the forget set; a run with others is another run.
    """

    def __init__(
        self,
        path: Path,
        subject: Subject,
        optimizer: torch.optim.Optimizer,
        belongs: Mapping[str, Any],
    ) -> None:
        self.path, self._subject, self._optimizer = path, subject, optimizer
        self._belongs = _comparable({**belongs, "optimizer state": of_optimizer(optimizer)})

    def save(self, progress: Progress) -> None:
        """Replace the file, as a whole."""
        tensors = {f"state.{k}": v for k, v in self._subject.state().items()}
        plain: dict[str, dict[str, Any]] = {}
        for i, slots in self._optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{key}"] = value
                else:
                    plain.setdefault(str(i), {})[key] = value
        tensors |= {"indices": progress.indices, "weights": progress.weights}
        if progress.scores is not None:
            tensors["scores"] = progress.scores
        run = {
            "epochs": progress.epochs,
            "step": progress.step,
            "trajectory": progress.records,
            "batch_losses": progress.batch_losses,
            "passed": progress.passed,
            "ended": progress.ended,
            "format": _FORMAT,
            "belongs": self._belongs,
            "optimizer": plain,
        }
        save_tensors(self.path, tensors, {"imu_fast": json.dumps(run)})

    def load(self, start: Progress) -> Progress:
        """Put subject and optimizer where the file left them.

        Args:
            start: the run about to begin, which must be the one that the file belongs to.

        Raises:
            InputError: the file belongs to another run, or is none of ours.
        """
        tensors, run = self._read()
        theirs, ours = run["belongs"], self._belongs
        changed = {
            key: (theirs.get(key), ours.get(key))
            for key in {**ours, **theirs}
            if theirs.get(key) != ours.get(key)
        }
        state = self._subject.state()
        shapes = {k: t.shape for k, t in state.items()}
        stored = {k[6:]: t.shape for k, t in tensors.items() if k.startswith("state.")}
        if changed or shapes != stored:
            way_out = _ANEW
            if changed and all(key.endswith(", order") for key in changed):
                way_out = (
                    "a loader with shuffle=False, or with a generator and its seed, gives the same "
                    f"order again; or {_ANEW}"
                )
            raise InputError(
                f"checkpoint={str(self.path)!r} belongs to another run (differs in "
                f"{changed or 'shapes'}); {way_out}"
            )
        with torch.no_grad():
            for key, tensor in state.items():
                tensor.copy_(tensors[f"state.{key}"])
        slots: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in run["optimizer"].items()}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, i, slot = key.split(".", 2)
                slots.setdefault(int(i), {})[slot] = tensor.clone()
        restored = self._optimizer.state_dict()
        restored["state"] = slots
        self._optimizer.load_state_dict(restored)
        return Progress(
            run["epochs"],
            run["step"],
            run["trajectory"],
            run["batch_losses"],
            tensors["indices"].clone(),
            tensors["weights"].to(start.weights.device, copy=True),
            start.scores,
            run["passed"],
            None if run["ended"] is None else tuple(run["ended"]),
        )

    def check_budget(self, there: Progress, epochs: int, max_steps: int | None) -> None:
        """Raise InputError if the file's run has gone beyond this budget."""
        if there.epochs > epochs or there.step > (max_steps or there.step):
            raise InputError(
                f"checkpoint={str(self.path)!r} is of a run that has made {there.epochs} epochs "
                f"and {there.step} steps, more than the budget of epochs={epochs}, "
                f"max_steps={max_steps}; give a larger one, or resume=False"
            )

    def mark(self, passed: list[str]) -> None:
        """Note in the file, whose state stays, that these milestones have been."""
        tensors, run = self._read()
        save_tensors(self.path, tensors, {"imu_fast": json.dumps(run | {"passed": passed})})

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The file's tensors and its record, both whole.

        Raises:
            InputError: none of ours, of another format, or damaged.
        """
        name = f"checkpoint={str(self.path)!r}"
        try:
            tensors, metadata = load_tensors(self.path)
        except InputError as error:
            raise InputError(f"{name} cannot be gone on from ({error}); {_ANEW}") from error
        if "imu_fast" not in metadata:
            raise InputError(f"{name} was not written by unlearn; {_ANEW}")
        try:
            run = json.loads(metadata["imu_fast"])
            found = run.get("format")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{name} is damaged ({brief(error)}); {_ANEW}") from error
        if found != _FORMAT:
            raise InputError(f"{name} has format {found!r}, this version writes {_FORMAT}; {_ANEW}")
        wanted = {"epochs", "step", "trajectory", "batch_losses", "passed", "belongs", "optimizer"}
        wanted |= {"ended"}
        if missing := (wanted - run.keys()) | ({"indices", "weights"} - tensors.keys()):
            raise InputError(f"{name} lacks {', '.join(sorted(missing))}: it is damaged; {_ANEW}")
        return tensors, run
