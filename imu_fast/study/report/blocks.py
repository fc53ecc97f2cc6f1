"""The results of a comparison, arranged as they are read: one block per task and depth.

Table, plots and report all draw from these blocks, so that they agree on the order of methods, on
which is best and on what is significant.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from imu_fast.errors import InputError

REFERENCES = ("original", "retrained")
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Metric:
    """A column: its key in the results, its heading, its decimals and what it says."""

    name: str
    label: str
    digits: int
    meaning: str


METRICS = (
    Metric("forget_accuracy", "forget acc.", 3, "accuracy on the forget set"),
    Metric("forget_loss", "forget loss", 2, "mean cross-entropy on the forget set"),
    Metric("retain_accuracy", "retain acc.", 3, "accuracy on the training data that is kept"),
    Metric("test_accuracy", "test acc.", 3, "accuracy on unseen data of what is kept"),
    Metric("auc", "memb. AUC", 3, "how well confidence tells forget from unseen data; 0.5: not"),
    Metric("ks", "memb. KS", 3, "Kolmogorov-Smirnov distance of the same confidences; 0: equal"),
    Metric("svc", "SVC", 3, "fraction of the forget set that an SVC attack calls training data"),
    Metric(
        "w1", "W1", 3, "Wasserstein-1 distance of confidence to the retrained model's, forget set"
    ),
    Metric("kl", "KL", 3, "divergence in nats from the retrained model's outputs, forget set"),
    Metric(
        "agreement", "agreement", 3, "fraction of forget predictions equal to the retrained model's"
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
    """A method in a block; ``marks``: ``*`` or ``**`` by metric that differs from the baseline."""

    method: str
    forget_only: bool
    runs: int
    reached: int
    lr: str
    steps: Spread
    seconds: Spread
    values: dict[str, Spread]
    marks: dict[str, str]
    best: bool = False

    @property
    def reference(self) -> bool:
        return self.method in REFERENCES

    @property
    def name(self) -> str:
        """The method, and in how many of its runs it got to the depth if not in all."""
        if self.reached == self.runs:
            return self.method
        return f"{self.method} ({self.reached}/{self.runs})"

    @property
    def retain(self) -> Spread:
        return self.values["retain_accuracy"]


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


def check_results(results: dict[str, Any]) -> None:
    """Raise InputError unless the results have every part that is drawn, and explain it."""
    parts = ("config", "versions", "seconds", "methods", "tasks", "depths", "rows", "summary")
    missing = [name for name in parts if name not in results]
    if missing:
        raise InputError(f"results lacks {', '.join(missing)}; pass what the comparison returned")
    if not results["rows"]:
        raise InputError("results['rows'] is empty; nothing was compared, give a task and a method")
    for one, all_of in (("task", "tasks"), ("depth", "depths")):
        unknown = {row[one] for row in results["rows"]} - {*results[all_of], "none"}
        if unknown:
            raise InputError(
                f"results['rows'] has {one}={unknown.pop()!r}; say in {all_of} what it is"
            )


def baseline_of(results: dict[str, Any]) -> str | None:
    """The method that the marks compare with: ``config["baseline"]``, else the first tested."""
    tests = results.get("tests", [])
    return results["config"].get("baseline") or (tests[0]["baseline"] if tests else None)


def number(value: Any) -> float:
    """The value as a float; NaN for None, which is how JSON writes it."""
    return math.nan if value is None else float(value)


def spread(entry: dict[str, Any], name: str) -> Spread:
    """Mean and standard deviation of a metric in an entry of the summary."""
    return Spread(number(entry.get(f"{name}_mean")), number(entry.get(f"{name}_std")))


def blocks(results: dict[str, Any]) -> list[Block]:
    """Arrange the results by task and depth, in the order of ``tasks`` and ``depths``.

    Best is the method with the highest mean retain accuracy among those that use the forget set
    only and got to the depth in every run.
    """
    check_results(results)
    summary = {(s["task"], s["depth"], s["method"]): s for s in results["summary"]}
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault((row["task"], row["depth"], row["method"]), []).append(row)
    marks = _marks(results)

    def line(key: tuple[str, str, str]) -> Line:
        method = key[2]
        runs = rows[key]
        # A reference has no depth to get to.
        reached = len(runs) if method in REFERENCES else sum(bool(r["reached"]) for r in runs)
        return Line(
            method=method,
            forget_only=results["methods"].get(method, {}).get("forget_only", False),
            runs=len(runs),
            reached=reached,
            lr=_range([number(r.get("lr")) for r in runs]),
            steps=_spread_of([number(r.get("steps")) for r in runs]),
            seconds=_spread_of([number(r.get("seconds")) for r in runs]),
            values={m.name: spread(summary.get(key, {}), m.name) for m in METRICS},
            # Where no run got to the depth, nothing was compared at it.
            marks={m.name: marks.get((m.name, *key), "") for m in METRICS} if reached else {},
        )

    arranged = []
    for task, about in results["tasks"].items():
        references = [line(k) for name in REFERENCES if (k := (task, "none", name)) in rows]
        for depth in results["depths"]:
            keys = [k for k in rows if k[:2] == (task, depth) and k[2] not in REFERENCES]
            if not keys:
                continue
            methods = _best_first([line(key) for key in keys])
            title = f"{about['title']} (n = {about['n']}), depth: {depth}"
            arranged.append(Block(task, depth, title, (*references, *methods)))
    return arranged


def _best_first(lines: list[Line]) -> list[Line]:
    def rank(line: Line) -> tuple[bool, bool, float]:
        value = line.retain.mean
        return line.reached == 0, math.isnan(value), -value

    ordered = sorted(lines, key=rank)
    for i, line in enumerate(ordered):
        if line.forget_only and line.reached == line.runs and not math.isnan(line.retain.mean):
            ordered[i] = replace(line, best=True)
            break
    return ordered


def _marks(results: dict[str, Any]) -> dict[tuple[str, str, str, str], str]:
    """``*``: the paired t-test is below 0.01 after Holm's correction; ``**``: Wilcoxon's too."""
    baseline = baseline_of(results)
    marks = {}
    for test in results.get("tests", []):
        # A comparison with NaN is False: what could not be tested has no mark.
        if test["baseline"] == baseline and number(test["t_p_holm"]) < SIGNIFICANT:
            both = number(test["wilcoxon_p_holm"]) < SIGNIFICANT
            key = (test["metric"], test["task"], test["depth"], test["method"])
            marks[key] = "**" if both else "*"
    return marks


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
