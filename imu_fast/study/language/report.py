"""The tables of a language experiment."""

from __future__ import annotations

from itertools import compress
from typing import Any

from rich.table import Table

from imu_fast.study.report.blocks import number, spread, verdict
from imu_fast.study.report.escapes import markdown_text


def _digits(results: dict[str, Any]) -> dict[str, int]:
    return {metric["name"]: metric["digits"] for metric in results["metrics"]}


def _tested(results: dict[str, Any]) -> list[str]:
    """Metrics that methods are compared in, in order."""
    return list(dict.fromkeys(test["metric"] for test in results["tests"]))


def _lines(results: dict[str, Any]) -> list[list[str]]:
    """References, then methods, each nearest first by the first metric, as :func:`headings`."""
    first, methods = results["metrics"][0]["name"], results["methods"]
    reached: dict[str, list[bool]] = {}
    for row in results["rows"]:
        reached.setdefault(row["method"], []).append(row["reached"])

    def place(entry: dict[str, Any]) -> tuple[bool, bool, float]:
        mean = number(entry[f"{first}_mean"])
        return entry["method"] in methods, mean != mean, mean

    found = []
    for entry in sorted(results["summary"], key=place):
        name = entry["method"]
        runs = reached[name]
        ours = name in methods
        line = [name, f"{sum(runs)}/{len(runs)}" if ours else ""]
        line += [spread(entry, metric).text(digits) for metric, digits in _digits(results).items()]
        steps = spread(entry, "steps").mean
        found.append([*line, f"{steps:.0f}" if ours and steps == steps else ""])
    return found


def headings(results: dict[str, Any]) -> list[str]:
    """Of the columns of the main table."""
    return ["method", "reached", *(metric["label"] for metric in results["metrics"]), "steps"]


def _tables_row(cells: list[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown(results: dict[str, Any]) -> str:
    """Both tables as Markdown: means and standard deviations, and the planned comparisons."""
    said = [f"{metric['label']}: {metric['meaning']}." for metric in results["metrics"]]
    lines = [
        f"{results['title']}: {results['seeds']} seeds, mean ± standard deviation. Depth: "
        f"{results['depth']}. {' '.join(said)} Reached: runs that came to the depth within the "
        "budget, of which the numbers are.",
        "",
        _tables_row(headings(results)),
        "| --- |" + " ---: |" * (len(headings(results)) - 1),
        *map(_tables_row, _lines(results)),
        "",
        *_tests_table(results),
    ]
    return "\n".join(lines) + "\n"


def _tests_table(results: dict[str, Any]) -> list[str]:
    """The planned comparisons: a line a method, a column a metric."""
    digits = _digits(results)
    labels = {metric["name"]: metric["label"] for metric in results["metrics"]}
    metrics = _tested(results)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for test in results["tests"]:
        name = test["metric"]
        # A gap is said in points, and needs two decimals fewer.
        verdict_there = verdict(test, max(1, digits[name] - 2 * (name == "gap")))
        found.setdefault((test["question"], test["method"]), {})[name] = verdict_there
    columns = [f"difference in {labels[name]}" for name in metrics]
    lines = [_tables_row(["question", "method", "against", *columns])]
    lines.append("|" + " --- |" * (3 + len(metrics)))
    for (question, method), said in found.items():
        against = results["questions"][question]["baseline"]
        cells = [said.get(name, "") for name in metrics]
        lines.append(_tables_row([question, method, against, *cells]))
    return lines


def language_table(results: dict[str, Any]) -> Table:
    """For a terminal, which is not wide enough for all metrics: those that are compared."""
    table = Table(
        title=results["title"],
        caption=f"Depth: {results['depth']}. All metrics are in the Markdown.",
    )
    tested = set(_tested(results))
    metrics = [metric["name"] in tested for metric in results["metrics"]]
    kept = [True, True, *metrics, True]  # method, reached; steps
    for heading in compress(headings(results), kept):
        name = heading == "method"
        table.add_column(heading, justify="left" if name else "right", no_wrap=name)
    for line in _lines(results):
        table.add_row(*compress(line, kept))
    return table
