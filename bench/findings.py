"""Write ``bench/FINDINGS.md`` from the results: ``python bench/findings.py``.

Every number in the findings is taken from ``results/compare-cifar10`` (its ``results.json`` and
``cells``), the linear datamodeling scores from ``results/validate-*``, by the template
``findings.md.j2``, so text, tables and results cannot differ; a test makes the file again and
compares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from imu_fast.evaluation.statistics import least_p
from imu_fast.storage import replacing
from imu_fast.study.entries import AUTO, DISTILLED, FLIPS, ORIGINAL, RETRAINED, TWIN
from imu_fast.study.report.blocks import Block, Line, blocks, number, p_value, verdict
from imu_fast.study.results import at_every_depth, read_results
from imu_fast.study.runs import STRESS
from imu_fast.study.validation import markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compare-cifar10"
FINDINGS = HERE / "FINDINGS.md"
# Beside these, each table has the method that is nearest to retraining.
SHOWN = (
    "uniform/all/train",
    "uniform/all/eval",
    "uniform/head/train",
    "uniform/head/eval",
    "imu/all/train",
    "imu/head/eval",
    "imu, paper preset",
    "permuted/head/eval",
    "npo, network",
    "simnpo, network",
    "random label, network",
    "boundary shrink, network",
    "precond. features, margin",
    "margin edit",
    "single row",
    AUTO,
    DISTILLED,
)
REFERENCES = (RETRAINED, TWIN, ORIGINAL, FLIPS)


class Findings:
    """What the template asks for, each out of the results."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.blocks = blocks(results)
        self.rows = at_every_depth(results["rows"])
        self.at_retraining = [b for b in self.blocks if b.depth != STRESS]
        self.stress = [b for b in self.blocks if b.depth == STRESS]
        cells = {(r["arch"], r["seed"], r["task"]) for r in self.rows}
        self.cells, self.planned = len(cells), results["planned"]["cells"]
        self.models = len({cell[:2] for cell in cells})
        self.seeds = len({cell[1] for cell in cells})
        measured = {row["method"] for row in self.rows}
        known = {name: m for name, m in results["methods"].items() if m["forget_only"]}
        scopes = [about["scope"] for name, about in known.items() if name in measured]
        self.of_head = scopes.count("head")
        self.of_network = len(scopes) - self.of_head
        self.least_p = p_value(least_p(self.seeds))

    def lines(self, block: Block) -> list[Line]:
        """References, then the methods shown and the nearest, in the block's order."""
        best = block.best.method if block.best else None
        shown = [m for m in block.methods if m.method in SHOWN or m.method == best]
        return self.references(block) + shown

    def references(self, block: Block) -> list[Line]:
        return [line for name in REFERENCES if (line := block.line(name)) is not None]

    def title(self, block: Block) -> str:
        about = self.results["tasks"][block.task]
        return f"{about['title']} (n = {about['n']})"

    def runs(self, block: Block) -> int:
        line = block.line(ORIGINAL)
        return 0 if line is None else line.runs

    def tests(self, question: str, metric: str) -> list[dict[str, Any]]:
        return [
            test
            for test in self.results["tests"]
            if (test["question"], test["metric"]) == (question, metric)
        ]

    def methods(self, question: str) -> tuple[str, ...]:
        """The methods that a question was asked of."""
        tests = self.results["tests"]
        return tuple({test["method"] for test in tests if test["question"] == question})

    def where(self, test: dict[str, Any]) -> str:
        return f"{self.results['tasks'][test['task']]['title']}, {test['depth']}"

    def count(self, question: str, metric: str, methods: tuple[str, ...] = ()) -> dict[str, int]:
        """How many tests of a question came out which way (lower is better for both metrics)."""
        found = {"tests": 0, "nearer": 0, "farther": 0, "equal": 0, "open": 0, "alone": 0}
        for test in self.tests(question, metric):
            if methods and test["method"] not in methods:
                continue
            found["tests"] += 1
            if test["n_clusters"] < 2:
                found["alone"] += 1
            elif number(test["t_p_holm"]) < 0.05:
                found["nearer" if number(test["difference"]) < 0 else "farther"] += 1
            else:
                found["equal" if test["equivalent"] else "open"] += 1
        return found

    def significant(self, question: str, metric: str, methods: tuple[str, ...]) -> list[str]:
        """Those tests of a question that found a difference, in words."""
        return [
            f"{self.where(test)}, {test['method']}: {verdict(test)}"
            for test in self.tests(question, metric)
            if test["method"] in methods and number(test["t_p_holm"]) < 0.05
        ]

    def nearest(self, block: Block) -> str:
        """Who is nearest to retraining of all, floors beside, in words."""
        best = block.best
        if best is None:
            return "no method reached the depth in every run"
        said = f"`{best.method}`, {points(best, 'gap')} points"
        original = block.line(ORIGINAL)
        if original is not None and original.gap.mean <= best.gap.mean:
            said += " (doing nothing is nearer)"
        return said

    def nearer_than_nothing(self) -> tuple[int, int]:
        """In how many tasks ``auto`` has a smaller gap than doing nothing on the same models."""
        found = [
            test
            for test in self.tests("recipe", "gap")
            if test["method"] == AUTO and not math.isnan(number(test["difference"]))
        ]
        return sum(test["difference"] < 0 for test in found), len(found)

    def gamed(self, block: Block) -> bool:
        """Whether random flips have no larger gap than the nearest method."""
        flips, best = block.line(FLIPS), block.best
        return flips is not None and best is not None and flips.gap.mean <= best.gap.mean

    def correlations(self) -> tuple[list[str], dict[str, list[float]]]:
        """Spearman correlation with exact influence, mean over models: columns, rows by task."""
        columns = list(dict.fromkeys(c["curvature"] for c in self.results["correlations"]))
        rows: dict[str, list[float]] = {}
        for task, about in self.results["tasks"].items():
            rows[about["title"]] = [
                _mean(
                    number(c["spearman_mean"])
                    for c in self.results["correlations"]
                    if (c["task"], c["curvature"]) == (task, column)
                )
                for column in columns
            ]
        return columns, rows

    def validated(self, data: str) -> str:
        """Caption and table of scores beside retraining on a data set."""
        path = HERE / "results" / f"validate-{data}" / "results.json"
        return markdown(json.loads(path.read_text(encoding="utf-8")))


def _mean(values: Any) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def points(line: Line, metric: str) -> str:
    """A fraction in points, one decimal."""
    return value(100 * line.values[metric].mean, 1)


def value(x: float, digits: int) -> str:
    return "-" if math.isnan(x) else f"{x:.{digits}f}"


def of(line: Line, metric: str, digits: int = 3) -> str:
    return value(line.values[metric].mean, digits)


def render(results: dict[str, Any]) -> str:
    """The findings as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, of our own results
    )
    return environment.get_template("findings.md.j2").render(
        f=Findings(results),
        of=of,
        points=points,
        value=value,
        verdict=verdict,
        AUTO=AUTO,
        DISTILLED=DISTILLED,
        ORIGINAL=ORIGINAL,
        TWIN=TWIN,
        FLIPS=FLIPS,
    )


if __name__ == "__main__":
    text = render(read_results(RESULTS))
    with replacing(FINDINGS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{FINDINGS.name}: {len(text.split())} words")
