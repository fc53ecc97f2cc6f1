"""A small made-up comparison with every gap that a real one has."""

from __future__ import annotations

import numpy as np

from imu_fast.study.cells import pack, rounded
from imu_fast.study.configuration import Configuration
from imu_fast.study.entries import AUTO, BASELINE, FLIPS, ORIGINAL, RETRAINED, TWIN
from imu_fast.study.results import collect
from imu_fast.study.runs import KINDS
from imu_fast.study.runs import METRICS as MEASURED

NEVER = "random label"
SOMETIMES = "boundary shrink, network"
METHODS = (BASELINE, "uniform/head/eval", "imu/head/eval", SOMETIMES, NEVER, "margin edit", AUTO)


def make_results(
    seeds=3, archs=("resnet", "vgg"), tasks=("class-3", "random-5"), methods=METHODS, late=()
):
    """A comparison with numbers drawn at random, and with every gap that a real one has.

    Args:
        late: methods that have run on the first model of the first task alone yet.
    """
    rng = np.random.default_rng(0)

    def measured(order):
        row = {m: float(np.clip(0.3 + 0.05 * order + rng.normal(0, 0.01), 0, 1)) for m in MEASURED}
        return row | {"relearn": float(rng.integers(1, 50)), "lira": None}

    config = Configuration(archs=archs, seeds=seeds, tasks=tasks, methods=methods)
    cells = []
    for task in tasks:
        kind = task.partition("-")[0]
        depths = KINDS[kind]
        for arch in archs:
            for seed in range(seeds):
                where = {"arch": arch, "seed": seed, "task": task}
                rows = [
                    {"method": name, "depth": depths[0], "reached": True, **measured(i)}
                    for i, name in enumerate((RETRAINED, TWIN, ORIGINAL))
                ]
                rows[0]["gap"] = 0.0
                rows += [
                    {"method": FLIPS, "depth": d, "reached": True, **measured(1)} for d in depths
                ]
                entries = {
                    "references": {"n": 50 + seed, "title": task.replace("-", " ")}
                    | {"unseen_accuracy": 0.7, "rows": pack(rows)},
                    "correlations": {"identity": 0.2, "kfac": 0.9},
                }
                first = (task, arch, seed) == (tasks[0], archs[0], 0)
                for order, name in enumerate(methods):
                    if name in late and not first:
                        continue
                    reached = name != NEVER and not (
                        name == SOMETIMES and seed == 0 and arch == archs[0]
                    )
                    rows = [
                        {"depth": d, "reached": reached, "lr": 0.01 * (1 + (arch == "vgg"))}
                        | (
                            {"steps": 20 + seed, "seconds": 1.5, **measured(order)}
                            if reached
                            else {}
                        )
                        for d in depths
                    ]
                    entries[name] = {"rows": pack(rows), "way": [[0.6, 0.8]] if reached else []}
                cells.append((where, rounded(entries)))
    return collect(config, cells)
