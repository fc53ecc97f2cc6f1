"""The results of a comparison: rows of its cells, their summary, and the tests planned for them.

On disk ``results.json`` holds all but the rows, which stay in the cells that it names.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

import imu_fast
from imu_fast.errors import InputError, brief
from imu_fast.evaluation.statistics import equivalence_tests, intervals, paired_tests, summary
from imu_fast.storage import replacing
from imu_fast.study.cells import Cell, Json, digest, pack, rounded, unpack
from imu_fast.study.configuration import Configuration
from imu_fast.study.data.tasks import kind_of
from imu_fast.study.entries import (
    AUTO,
    BASELINE,
    DISTILLED,
    FLIPS,
    HEAD_BASELINE,
    HIGHLIGHT,
    ORIGINAL,
    REFERENCES,
    TWIN,
    entries_named,
)
from imu_fast.study.runs import DEPTHS, KINDS, METRICS, STRESS

RULE = (
    "Learning rate: of a grid, the one with the best accuracy on validation images at the task's "
    "first depth, of those that reach it within a third of the step budget, on a model of its own "
    "(seed 100) that the report does not use; chosen once per architecture for a class and once "
    "for random sets. Where it diverges on a model of the report, the next smaller one."
)
# A seed names a training subset and a forget set, which architectures share: they are no
# independent runs, so tests and intervals are over seeds, each the mean of its architectures.
CLUSTER = "seed"
# What is close enough to be called equal: a point of accuracy or of the average gap, 0.02 nats.
MARGINS = {"gap": 0.01, "retain_accuracy": 0.01, "test_accuracy": 0.01, "kl_forget": 0.02}


Cells = Sequence[tuple[Json, Mapping[str, Any]]]


@dataclass(frozen=True)
class Question:
    """What was to be answered, and the methods compared for it with one that lacks only that."""

    asks: str
    baseline: str
    methods: tuple[str, ...]


QUESTIONS = {
    "weights": Question(
        "What do the influence weights do, on the head with BatchNorm frozen?",
        HEAD_BASELINE,
        ("imu/head/eval", "imu, ggn", "permuted/head/eval", "loss weights"),
    ),
    "weights, network": Question(
        "The same for the whole network in training mode, as published code runs it.",
        BASELINE,
        ("imu/all/train", "permuted/all/train"),
    ),
    "freezing": Question(
        "What does it do to freeze BatchNorm, the backbone, or both?",
        BASELINE,
        ("uniform/all/eval", "uniform/head/train", HEAD_BASELINE),
    ),
    "recipe": Question(
        "Is the recommended recipe nearer to retraining than doing nothing?",
        ORIGINAL,
        (AUTO, DISTILLED, HEAD_BASELINE, BASELINE, FLIPS, TWIN),
    ),
}


@dataclass
class _Measured:
    """What cells hold, by kind."""

    rows: list[Json] = field(default_factory=list)
    ways: list[Json] = field(default_factory=list)
    tasks: dict[str, Json] = field(default_factory=dict)
    correlations: list[Json] = field(default_factory=list)

    def add(self, where: Json, name: str, value: Json) -> None:
        if name == "correlations":
            self.correlations.append(where | {"correlations": value})
            return
        found = unpack(value["rows"])
        self.rows += [where | dict.fromkeys(METRICS) | {"method": name} | row for row in found]
        if name == "references":
            about = {"title": value["title"], "kind": kind_of(where["task"])}
            known = self.tasks.setdefault(where["task"], about | {"n": [], "unseen_accuracy": []})
            known["n"].append(value["n"])
            known["unseen_accuracy"].append(value["unseen_accuracy"])
        else:
            self.ways.append(where | {"method": name, "way": value["way"]})

    @classmethod
    def of(cls, cells: Cells) -> Self:
        found = cls()
        for where, entries in cells:
            for name, value in entries.items():
                found.add(where, name, value)
        return found


def collect(config: Configuration, cells: Cells) -> Json:
    """Rows, their summary and tests, out of what was measured.

    Args:
        cells: arch, seed and task of each, and its entries ``{name: value}`` as far as they are
            there.

    Raises:
        InputError: there are none.
    """
    measured = _Measured.of(cells)
    rows, tasks = measured.rows, measured.tasks
    if not rows:
        raise InputError("nothing is measured yet; give the comparison more minutes")
    for about in tasks.values():
        sizes, unseen = about["n"], about["unseen_accuracy"]
        about["n"] = min(sizes) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        about["unseen_accuracy"] = sum(unseen) / len(unseen)
    entries = entries_named(config.methods)
    wide = at_every_depth(rows)
    table = summary(wide, METRICS)
    methods = {name: entry.describe() for name, entry in entries.items()}
    nothing = {"forget_only": False, "scope": "-", "batchnorm": "-", "weights": "-"}
    methods |= {name: nothing | {"summary": about} for name, about in REFERENCES.items()}
    results = {
        "config": config.as_dict(),
        "rule": RULE,
        "highlight": list(HIGHLIGHT),
        "versions": {
            "imu_fast": imu_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": os.cpu_count(),
        },
        "planned": _planned(config),
        "methods": methods,
        "tasks": {task: tasks[task] for task in config.tasks if task in tasks},
        "depths": {k: v for k, v in DEPTHS.items() if any(row["depth"] == k for row in rows)},
        "questions": {k: {"asks": q.asks, "baseline": q.baseline} for k, q in QUESTIONS.items()},
        "summary": table,
        "intervals": _intervals(wide),
        "tests": _tests(wide),
        "correlations": _correlations(measured.correlations),
        "rows": rows,
        "ways": measured.ways,
    }
    return dict(rounded(results))


def _planned(config: Configuration) -> Json:
    """How many runs a full comparison has of each kind of task: models times tasks."""
    models = len(config.archs) * config.seeds
    return {"models": models, "cells": models * len(config.tasks)}


def at_every_depth(rows: list[Json]) -> list[Json]:
    """The rows, and those of references at each depth of their task: doing nothing has no depth."""
    found = []
    for row in rows:
        depths = KINDS[kind_of(row["task"])]
        same = row["method"] in REFERENCES and row["method"] != FLIPS
        found += [{**row, "depth": d} for d in (depths if same else (row["depth"],))]
    return found


def _intervals(rows: list[Json]) -> list[Json]:
    return [
        {"metric": metric, **line}
        for metric in ("gap", "kl_forget", "retain_accuracy")
        for line in intervals(rows, metric, cluster=CLUSTER)
    ]


def _tests(rows: list[Json]) -> list[Json]:
    """Each question's differences: tested for being there, and for being too small to matter."""
    found = []
    for name, question in QUESTIONS.items():
        wanted = (question.baseline, *question.methods)
        for metric, margin in MARGINS.items():
            # Where retraining does not go, a distance to it answers nothing.
            asked = [
                row
                for row in rows
                if row["method"] in wanted
                and (row["depth"] != STRESS or metric in ("retain_accuracy", "test_accuracy"))
            ]
            there = {row["method"] for row in asked}
            if question.baseline not in there or len(there) < 2:
                continue
            differ = paired_tests(asked, metric, question.baseline, cluster=CLUSTER)
            alike = equivalence_tests(asked, metric, question.baseline, margin, cluster=CLUSTER)
            found += [
                {"question": name, "metric": metric, "margin": margin, **same, **line}
                for line, same in zip(differ, alike, strict=True)
                if line["n_pairs"]  # or nothing was compared, in a comparison that is not finished
            ]
    return found


def _correlations(parts: list[Json]) -> list[Json]:
    values: dict[tuple[str, str, str], list[float]] = {}
    for part in parts:
        for name, value in part["correlations"].items():
            known = values.setdefault((part["task"], part["arch"], name), [])
            if value is not None:  # scores that are all alike are in no order
                known.append(value)
    found = []
    for (task, arch, name), those in values.items():
        t = torch.tensor(those, dtype=torch.float64)
        spread = float(t.std()) if len(t) > 1 else math.nan
        keys = {"task": task, "arch": arch, "curvature": name}
        found.append(keys | {"spearman_mean": float(t.mean()), "spearman_std": spread})
    return found


_TABLES = ("summary", "intervals", "tests", "correlations")
# All that a file holds; of the rest, the checksum. Those of older versions have none.
_PARTS = {
    *("config", "rule", "highlight", "versions", "planned", "methods", "tasks", "depths"),
    *("questions", "cells", "checksum", *_TABLES),
}


def write_results(results: Json, files: Mapping[str, Json], out: Path) -> None:
    """Write ``results.json``: all but what the cells hold.

    Args:
        files: of the cells, by name: ``key``, arch, seed, task, and a digest of their entries.
    """
    kept = {k: v for k, v in results.items() if k not in ("rows", "ways")} | {"cells": files}
    lines = [
        f"{json.dumps(name)}: {_table(value) if name in _TABLES else json.dumps(value, indent=1)}"
        for name, value in kept.items()
    ]
    checksum = digest(json.loads("{" + ",".join(lines) + "}"))
    lines.append(f'"checksum": {json.dumps(checksum)}')
    with replacing(out / "results.json") as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _table(rows: list[Json]) -> str:
    """A packed table in JSON, a line a row."""
    table = pack(rows)
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table["rows"])
    return f'{{"columns": {json.dumps(table["columns"])}, "rows": [\n{lines}\n]}}'


def read_results(out: Path) -> Json:
    """The results in a folder, with the rows that its cells hold.

    Raises:
        InputError: a file is missing, damaged or another's.
    """
    path = out / "results.json"
    try:
        results: Json = dict(json.loads(path.read_text()))
        checksum = results.pop("checksum", None)
        if not results.keys() <= _PARTS or checksum not in (None, digest(results)):
            raise ValueError("it is damaged, or was changed: write it again from its cells")
        for name in _TABLES:
            results[name] = unpack(results[name])
        known = ("references", "correlations", *results["methods"])
        cells = []
        for file, about in results.pop("cells").items():
            where = dict(about)
            key, expected = where.pop("key"), where.pop("entries")
            found = Cell(out / "cells" / file, key).read()
            entries = {n: e["value"] for n, e in found.items() if n in known}
            if digest(entries)[:12] != expected:
                raise InputError(
                    f"path={str(path)!r} is older than its cell {file}; run the comparison again "
                    "(--minutes 0 measures nothing)"
                )
            cells.append((where, entries))
        measured = _Measured.of(cells)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"path={str(path)!r} holds no comparison: {brief(error)}") from error
    return results | {"rows": measured.rows, "ways": measured.ways}
