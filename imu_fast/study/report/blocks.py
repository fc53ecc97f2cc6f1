"""The results of a comparison, arranged as they are read: one block per task and depth.

Table, plots and report all draw from these blocks, so that they agree on the order of methods, on
which is nearest to retraining and on what is said of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from imu_fast.errors import InputError
from imu_fast.study.entries import AUTO, ORIGINAL, REFERENCES, RETRAINED
from imu_fast.study.runs import STRESS

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Metric:
    """A column: its key in the results, its heading, its decimals and what it says."""

    name: str
    label: str
    digits: int
    meaning: str


_APART = (
    ("kl", "KL", "divergence in nats from the retrained model's outputs"),
    ("w1", "W1", "Wasserstein-1 distance of confidence to the retrained model's"),
    ("agreement", "agreement", "fraction of predictions equal to the retrained model's"),
)
METRICS = (
    Metric(
        "gap",
        "gap",
        3,
        "average gap: mean absolute difference to the retrained model in the next four; it can be "
        "gamed (random flips do), so read it beside KL",
    ),
    Metric("forget_accuracy", "forget acc.", 3, "accuracy on the forget set"),
    Metric("retain_accuracy", "retain acc.", 3, "accuracy on the training data that is kept"),
    Metric("test_accuracy", "test acc.", 3, "accuracy on unseen data of what is kept"),
    Metric(
        "membership",
        "members",
        3,
        "fraction of the forget set that a support vector attack calls training data; it has "
        "learned on retain data and on held-out data of kept classes",
    ),
    *(
        Metric(f"{name}_{on}", f"{label}, {on}", 3, f"{meaning}, {on} set")
        for name, label, meaning in _APART
        for on in ("forget", "retain", "test")
    ),
    Metric("forget_loss", "forget loss", 2, "mean cross-entropy on the forget set"),
    Metric("auc", "conf. AUC", 3, "how well confidence tells forget from unseen data; 0.5: not"),
    Metric("ks", "conf. KS", 3, "Kolmogorov-Smirnov distance of the same confidences; 0: equal"),
    Metric(
        "lira",
        "LiRA AUC",
        3,
        "the same for the likelihood-ratio attack (Carlini et al. 2022, offline), whose models "
        "were trained on other images",
    ),
    Metric(
        "relearn", "relearn", 1, "steps of training the head until 0.9 of it is back; 50: it is not"
    ),
    Metric("probe", "probe", 3, "accuracy on the forget set of a linear probe on the features"),
)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation; NaN where there is none (no run, or only one)."""

    mean: float = math.nan
    std: float = math.nan

    def text(self, digits: int) -> str:
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.std):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}"


@dataclass(frozen=True)
class Line:
    """A method, or a reference, in a block.

    Attributes:
        runs: it was measured in; models: that any line of the block was. Fewer runs: the comparison
            is not finished, and its means are not over the same models as the others'.
    """

    method: str
    forget_only: bool
    runs: int
    reached: int
    lr: str
    steps: Spread
    seconds: Spread
    values: dict[str, Spread]
    models: int = 0
    best: bool = False

    @property
    def partial(self) -> bool:
        """Whether it was measured on fewer models than others of the block."""
        return self.runs < self.models

    @property
    def reference(self) -> bool:
        return self.method in REFERENCES

    @property
    def name(self) -> str:
        """The method; in how many of its runs it got to the depth, and of how many models it ran.

        Each where it is not all.
        """
        reached = "" if self.reached == self.runs else f" ({self.reached}/{self.runs})"
        return self.method + reached + (f" [{self.runs} of {self.models}]" if self.partial else "")

    @property
    def retain(self) -> Spread:
        return self.values["retain_accuracy"]

    @property
    def gap(self) -> Spread:
        return self.values["gap"]


@dataclass(frozen=True)
class Block:
    """What was measured for one task at one depth: the references, then methods, best first."""

    task: str
    depth: str
    title: str
    lines: tuple[Line, ...]

    @property
    def references(self) -> list[Line]:
        return [line for line in self.lines if line.reference]

    @property
    def methods(self) -> list[Line]:
        return [line for line in self.lines if not line.reference]

    @property
    def best(self) -> Line | None:
        return next((line for line in self.lines if line.best), None)

    @property
    def ranked_by(self) -> Metric:
        """What methods are ordered by: the gap, or what is kept where retraining does not go."""
        name = "retain_accuracy" if self.depth == STRESS else "gap"
        return next(m for m in METRICS if m.name == name)

    def line(self, method: str) -> Line | None:
        return next((line for line in self.lines if line.method == method), None)


_PARTS = ("config", "versions", "methods", "tasks", "depths", "rows", "summary", "tests", "ways")


def check_results(results: dict[str, Any]) -> None:
    """Raise InputError unless the results have every part that is drawn, and explain it."""
    missing = [name for name in _PARTS if name not in results]
    if missing:
        raise InputError(f"results lacks {', '.join(missing)}; pass what the comparison returned")
    if not results["rows"]:
        raise InputError("results['rows'] is empty; nothing was compared, give a task and a method")
    for one, all_of in (("task", "tasks"), ("depth", "depths")):
        unknown = {row[one] for row in results["rows"]} - {*results[all_of]}
        if unknown:
            raise InputError(
                f"results['rows'] has {one}={unknown.pop()!r}; say in {all_of} what it is"
            )


def number(value: Any) -> float:
    """The value as a float; NaN for None, which is how JSON writes it."""
    return math.nan if value is None else float(value)


def spread(entry: dict[str, Any], name: str) -> Spread:
    """Mean and standard deviation of a metric in an entry of the summary."""
    return Spread(number(entry.get(f"{name}_mean")), number(entry.get(f"{name}_std")))


def blocks(results: dict[str, Any]) -> list[Block]:
    """Arrange the results by task and depth, in the order of ``tasks`` and ``depths``.

    Best is the method nearest to retraining by the average gap (at the stress test: the one with
    the highest retain accuracy) of those that use the forget set only, were measured on every model
    of the block and got to the depth on each.
    """
    check_results(results)
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault((row["task"], row["depth"], row["method"]), []).append(row)

    def line(entry: dict[str, Any]) -> Line:
        method = entry["method"]
        runs = rows.get((entry["task"], entry["depth"], method), [])
        return Line(
            method=method,
            forget_only=results["methods"].get(method, {}).get("forget_only", False),
            runs=entry["n"],
            # A reference has no depth to get to, and is measured at one of several.
            reached=sum(bool(r["reached"]) for r in runs) if runs else entry["n"],
            lr=_range([number(r.get("lr")) for r in runs]),
            steps=_spread_of([number(r.get("steps")) for r in runs]),
            seconds=_spread_of([number(r.get("seconds")) for r in runs]),
            values={m.name: spread(entry, m.name) for m in METRICS},
        )

    arranged = []
    for task, about in results["tasks"].items():
        for depth in results["depths"]:
            lines = [
                line(entry)
                for entry in results["summary"]
                if (entry["task"], entry["depth"]) == (task, depth)
            ]
            models = max((one.runs for one in lines), default=0)
            lines = [replace(one, models=models) for one in lines]
            block = Block(task, depth, f"{about['title']} (n = {about['n']}), depth: {depth}", ())
            methods = _best_first(block, [one for one in lines if not one.reference])
            if methods:
                references = [one for one in lines if one.reference]
                arranged.append(replace(block, lines=(*references, *methods)))
    return arranged


def _best_first(block: Block, lines: list[Line]) -> list[Line]:
    metric = block.ranked_by.name
    sign = 1 if metric == "gap" else -1

    def rank(line: Line) -> tuple[bool, bool, float]:
        value = line.values[metric].mean
        return line.reached == 0, math.isnan(value), sign * value

    ordered = sorted(lines, key=rank)
    for i, line in enumerate(ordered):
        if (
            line.forget_only
            and not line.partial
            and line.reached == line.runs
            and not math.isnan(line.values[metric].mean)
        ):
            ordered[i] = replace(line, best=True)
            break
    return ordered


@dataclass(frozen=True)
class Cell:
    """A method of the factorial: what it trains, BatchNorm's mode, how samples are weighted."""

    trained: str
    batchnorm: str
    weights: str
    line: Line


def factorial(block: Block) -> list[Cell]:
    """The methods named ``weights/trained/batchnorm``, sorted by name; some or none."""
    found = []
    for line in sorted(block.methods, key=lambda line: line.method):
        corner = line.method.split("/")
        if len(corner) == 3 and line.reached:
            weights, trained, batchnorm = corner
            found.append(Cell(trained, batchnorm, weights, line))
    return found


def verdict(test: dict[str, Any], digits: int = 2) -> str:
    """A planned test in words: how large the difference is, and what may be said of it."""
    points = test["metric"] == "gap" or "accuracy" in test["metric"]
    unit, scale = ("points", 100) if points else ("nats", 1)
    low, high = number(test["low"]), number(test["high"])
    if math.isnan(number(test["difference"])):
        return "no run in common"
    said = f"{number(test['difference']) * scale:+.{digits}f} {unit}"
    if math.isnan(low):
        return f"{said}; too few seeds to say more"
    said += f" (95 %: {low * scale:+.{digits}f} to {high * scale:+.{digits}f})"
    if number(test["t_p_holm"]) < SIGNIFICANT:
        p = p_value(test["t_p_holm"])
        found = f"significant, p {p if p.startswith('<') else '= ' + p}"
    elif test["equivalent"]:
        margin = test["margin"] * scale
        found = f"not significant, and equal within {margin:g} {unit[:-1] if margin == 1 else unit}"
    else:
        found = "not significant, and not shown to be equal either"
    return f"{said}: {found}"


def p_value(value: Any) -> str:
    p = number(value)
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def verdicts(results: dict[str, Any], block: Block) -> Iterator[tuple[str, str, str]]:
    """``(question, method, verdict on the gap)`` of each planned test of a block."""
    for test in results["tests"]:
        if (test["task"], test["depth"], test["metric"]) == (block.task, block.depth, "gap"):
            yield test["question"], test["method"], verdict(test)


def drawn(results: dict[str, Any], arranged: list[Block], task: str) -> list[str]:
    """Methods that a task's trade-off shows: those wished for, ``auto``, and every block's best."""
    best = [b.best.method for b in arranged if b.task == task and b.best is not None]
    there = {row["method"] for row in results["rows"] if row["task"] == task}
    wanted = dict.fromkeys([*results.get("highlight", ()), AUTO, *best])
    return [name for name in wanted if name in there and name not in REFERENCES]


def points(results: dict[str, Any], task: str, method: str) -> list[list[tuple[float, float]]]:
    """A method's runs as (forget, retain) accuracy at bisected depths, the start first.

    The last points are the table's own rows; between them and the start there is one on the way.
    Only depths that every run got to are kept, so that a mean over runs is one of the same runs.
    """
    original = {
        (r["arch"], r["seed"]): (number(r["forget_accuracy"]), number(r["retain_accuracy"]))
        for r in results["rows"]
        if r["task"] == task and r["method"] == ORIGINAL
    }
    way = {
        (w["arch"], w["seed"]): w["way"]
        for w in results["ways"]
        if w["task"] == task and w["method"] == method
    }
    stages = [original]
    if all(way.values()):
        stages.append({run: tuple(passed[0]) for run, passed in way.items()})
    for depth in results["depths"]:
        stages.append(
            {
                (r["arch"], r["seed"]): (number(r["forget_accuracy"]), number(r["retain_accuracy"]))
                for r in results["rows"]
                if (r["task"], r["method"], r["depth"]) == (task, method, depth) and r["reached"]
            }
        )
    runs = [run for run in original if run in way]
    kept = [stage for stage in stages if runs and all(run in stage for run in runs)]
    return [[stage[run] for stage in kept] for run in runs]


def floors(block: Block) -> list[Line]:
    """The references beside which a gap is read: doing nothing, flips, another retrained model."""
    return [line for line in block.references if line.method != RETRAINED]


def _range(values: list[float]) -> str:
    known = sorted({v for v in values if not math.isnan(v)})
    if not known:
        return ""
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g}-{known[-1]:g}"


def _spread_of(values: list[float]) -> Spread:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return Spread()
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan)
