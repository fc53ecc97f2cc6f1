"""The demo: IMU, its controls and its rivals on real digits, all stopped at the same depth."""

from __future__ import annotations

import copy
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import imu_fast
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.evaluation.gap import average_gap, random_flips
from imu_fast.evaluation.metrics import distance, membership_accuracy
from imu_fast.model.outputs import Outputs, outputs_of
from imu_fast.storage import replacing
from imu_fast.study.data import digits
from imu_fast.study.networks import train_small_network
from imu_fast.study.report import demo_plots as plots
from imu_fast.unlearning.result import DivergedError, UnlearnResult
from imu_fast.unlearning.unlearn import unlearn

METHODS: dict[str, dict[str, Any]] = {
    "auto (head)": {"method": "auto"},
    "IMU (head)": {},
    "permuted weights (head)": {"method": "permuted"},
    "uniform ascent (head)": {"method": "uniform"},
    "uniform ascent (network)": {"method": "uniform", "scope": "all"},
    "preconditioned margin (head)": {
        "method": "uniform",
        "objective": "margin",
        "precondition": "features",
    },
}
LEARNING_RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4)
RULE = "learning rate: the largest of the grid with which the depth takes 20 steps or more"
_MIN_STEPS, _MAX_STEPS = 20, 2000
_BUDGET = {"epochs": _MAX_STEPS, "max_steps": _MAX_STEPS, "record": "step"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        forget, retain, test: accuracies. member: see membership_accuracy. gap: the mean absolute
            difference of these four to the retrained model's, see average_gap. kl: KL(retrained ||
            this) on the forget set, in nats.
    """

    task: str
    method: str
    forget: float
    retain: float
    test: float
    member: float
    gap: float
    kl: float
    lr: float | None = None
    steps: int | None = None
    seconds: float | None = None
    stopped_by: str | None = None


class Seen:
    """What a model makes of a task's three sets."""

    def __init__(self, forget: Outputs, retain: Outputs, test: Outputs, seed: int) -> None:
        self.forget, self.retain, self.test, self.seed = forget, retain, test, seed
        self.values = {
            "forget_accuracy": forget.accuracy,
            "retain_accuracy": retain.accuracy,
            "test_accuracy": test.accuracy,
            "membership": membership_accuracy(
                retain.confidence, test.confidence, forget.confidence, seed=seed
            ),
        }

    @classmethod
    def of(cls, model: nn.Module, task: digits.DigitsTask, seed: int) -> Seen:
        forget, retain, test = (outputs_of(model, s) for s in (task.forget, task.retain, task.test))
        return cls(forget, retain, test, seed)

    def flipped(self, accuracy: float) -> Seen:
        """With forget predictions wrong at random, down to that accuracy."""
        forget = random_flips(self.forget, accuracy, seed=self.seed)
        return Seen(forget, self.retain, self.test, self.seed)

    def row(self, task: digits.DigitsTask, name: str, retrained: Seen, **extra: Any) -> Row:
        return Row(
            task.name,
            name,
            forget=self.values["forget_accuracy"],
            retain=self.values["retain_accuracy"],
            test=self.values["test_accuracy"],
            member=self.values["membership"],
            gap=average_gap(self.values, retrained.values),
            kl=distance(self.forget, retrained.forget)["kl"],
            **extra,
        )


def forget_with(
    model: nn.Module, task: digits.DigitsTask, options: dict[str, Any], seed: int
) -> tuple[UnlearnResult, float | None]:
    """Unlearn a copy of the model at the learning rate that the stated rule chooses.

    ``auto`` has its own, and returns None.
    """
    own = options.get("method") == "auto"
    rates = (None,) if own else LEARNING_RATES
    found: list[tuple[UnlearnResult, float | None]] = []
    for lr in rates:
        given: dict[str, Any] = {} if own else {"lr": lr, **_BUDGET}
        try:
            result = unlearn(
                copy.deepcopy(model),
                task.forget,
                stop=task.stop,
                watch={"retain": task.retain},
                seed=seed,
                **given,
                **options,
            )
        except DivergedError:
            continue
        found.append((result, lr))
        if result.steps >= _MIN_STEPS:
            break
    return found[-1]


def run(out: Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Run the demo; writes plots and ``results.json`` into ``out``, and returns what it wrote.

    Args:
        quick: two methods and a shorter training, for tests.
    """
    data = digits.load(seed)
    epochs = 5 if quick else 20
    methods = dict(list(METHODS.items())[: 2 if quick else None])
    tasks = [
        digits.class_task(data, 3),
        digits.random_task(data, 50, seed),
        digits.random_task(data, 50, seed, flipped=True),
    ]
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    files: list[str] = []
    total = 1 + len(tasks) * (1 + len(methods))
    with tqdm(total=total, desc="demo", unit="run", disable=not progress) as bar:
        model = train_small_network(data.train, seed, epochs)
        unseen = evaluate(model, data.calibration)["accuracy"]
        bar.update()
        for task in tasks:
            original = Seen.of(model, task, seed)
            first, second = (
                Seen.of(train_small_network(task.retain, seed + k, epochs), task, seed)
                for k in (1, 2)
            )
            rows.append(original.row(task, "original (nothing done)", first))
            rows.append(first.row(task, "retrained without", first))
            rows.append(second.row(task, "retrained, another seed", first))
            line = task.stop.measured(lambda _: unseen).accuracy
            assert line is not None
            rows.append(original.flipped(line).row(task, "random flips", first))
            bar.update()
            paths: dict[str, list[dict[str, float]]] = {}
            for name, options in methods.items():
                result, lr = forget_with(model, task, options, seed)
                paths[name] = result.trajectory
                rows.append(
                    Seen.of(result.model, task, seed).row(
                        task,
                        name,
                        first,
                        lr=lr,
                        steps=result.steps,
                        seconds=result.seconds,
                        stopped_by=result.stopped_by,
                    )
                )
                bar.update()
            scores = imu_fast.influence_scores(model, task.forget)
            stem = task.name.replace(",", "").replace(" ", "-")
            files += [
                plots.trajectories(out / f"{stem}-trajectory.png", task.name, paths),
                plots.histogram(out / f"{stem}-influence.png", task.name, scores),
                plots.extremes(out / f"{stem}-images.png", task.name, *task.forget, scores),
            ]
    results = {
        "rows": [asdict(row) for row in rows],
        "depth": {task.name: task.depth.format(unseen=unseen) for task in tasks},
        "unseen_accuracy": unseen,
        "sizes": {task.name: len(task.forget[1]) for task in tasks},
        "rule": RULE,
        "settings": {name: options for name, options in methods.items()},
        "seed": seed,
        "quick": quick,
        "versions": {
            "imu_fast": imu_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        },
        "files": files,
    }
    with replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    return results
