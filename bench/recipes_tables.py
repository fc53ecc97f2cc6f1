"""Tables of ``recipes.py``: ``python bench/recipes_tables.py`` prints those of docs/recipes.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from imu_fast.evaluation.statistics import t_interval
from imu_fast.study.cells import unpack

RESULTS = Path(__file__).parent / "results" / "recipes.json"
ORIGINAL, TWIN, FLIPS = "doing nothing", "another retrained model", "random flips"
SOFTER = "doing nothing, softer"
METRICS = ("gap", "kl", "kl_test", "forget", "retain", "test", "membership")
AUTO = ("auto", "auto, summary")


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each data set, task and method: means over seeds, and what differs from doing nothing.

    Of ``auto`` with a summary also what differs from it without. Differences are of the same seed:
    their mean, and Student's interval of it.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["data"], row["task"], row["method"]), []).append(row)

    def less(group: list[dict[str, Any]], other: list[dict[str, Any]], name: str) -> list[float]:
        beside = {row["seed"]: row[name] for row in other}
        found = np.array([row[name] - beside[row["seed"]] for row in group])
        return [float(found.mean()), *t_interval(found)]

    table = []
    for (part, data, task, method), group in groups.items():
        line: dict[str, Any] = {"part": part, "data": data, "task": task, "method": method}
        line |= {name: float(np.mean([row[name] for row in group])) for name in METRICS}
        others = {"nothing": ORIGINAL} | ({"auto": AUTO[0]} if method == AUTO[1] else {})
        for short, other in others.items():
            for name in ("gap", "kl"):
                beside = groups[part, data, task, other]
                line[f"{name}_to_{short}"] = less(group, beside, name)
        table.append({**line, "seeds": len(group)})
    return table


def shown(lines: list[dict[str, Any]]) -> str:
    """A table of each data set and task, the nearest first."""
    blocks: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        blocks.setdefault((line["part"], line["data"], line["task"]), []).append(line)
    texts = []
    for (part, data, task), block in blocks.items():
        rows = [
            [
                line["method"],
                100 * line["gap"],
                "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in line["gap_to_nothing"])),
                line["kl"],
                "{:+.2f} ({:+.2f} to {:+.2f})".format(*line["kl_to_nothing"]),
                *(line[name] for name in METRICS[2:]),
            ]
            for line in sorted(block, key=lambda line: line["gap"])
        ]
        heads = ["method", "gap", "to nothing", "KL", "to nothing", "KL test", "UA", "RA", "TA"]
        body = tabulate(rows, [*heads, "MIA"], tablefmt="github", floatfmt=".3f")
        texts.append(f"{data}, {task} ({part}, {block[0]['seeds']} seeds)\n\n{body}\n")
    return "\n".join(texts)


def _titles(lines: list[dict[str, Any]]) -> dict[str, str]:
    """Tasks as columns, classes last."""
    tasks = dict.fromkeys(line["task"] for line in lines)
    return {
        t: f"{t[7:]} % at random" if t.startswith("random") else t.replace("-", " ") for t in tasks
    }


def short_of_depth(rows: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """Which ``(data, task, method)`` of the report kept more of a forget set than the depth allows.

    Half a sample of the largest set apart is rounding.
    """
    rows = [row for row in rows if row["part"] == "report"]
    return {
        (row["data"], row["task"], row["method"])
        for row in rows
        if row["forget"] > row["depth"] + 1e-3
    }


def overview(results: dict[str, Any], data: str) -> str:
    """Average gap in points and KL in nats of every method and task: Markdown.

    A star: a recipe that did not come to the depth in every model.
    """
    every, short = unpack(results["means"]), short_of_depth(unpack(results["rows"]))
    lines = [line for line in every if (line["part"], line["data"]) == ("report", data)]
    titles, needs = _titles(lines), results["about"]["needs"]
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        by_task = {line["task"]: line for line in lines if line["method"] == method}
        cells = [
            f"{100 * by_task[t]['gap']:.1f} / {by_task[t]['kl']:.2f}"
            + " *" * (method in needs and (data, t, method) in short)
            if t in by_task
            else "-"
            for t in titles
        ]
        rows.append([method, needs.get(method, "-"), *cells])
    return tabulate(rows, ["method", "is given", *titles.values()], tablefmt="github")


def differences(results: dict[str, Any], part: str = "report") -> str:
    """What ``auto`` changes, with intervals: Markdown."""
    rows = []
    lines = [line for line in unpack(results["means"]) if line["part"] == part]
    for line in lines:
        title = _titles(lines)[line["task"]]
        for other, named in (("nothing", ORIGINAL), ("auto", AUTO[0])):
            gap, kl = line.get(f"gap_to_{other}"), line.get(f"kl_to_{other}")
            alike = other == "auto" and line["task"].startswith("class")
            if line["method"] not in AUTO or gap is None or kl is None or alike:
                continue
            cells = [
                "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in gap)),
                "{:+.2f} ({:+.2f} to {:+.2f})".format(*kl),
            ]
            rows.append([line["data"], title, line["method"], named, *cells])
    heads = ["data", "task", "recipe", "against", "gap, points", "KL, nats"]
    return tabulate(rows, heads, tablefmt="github")


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text())
    for name in dict.fromkeys(line["data"] for line in unpack(found["means"])):
        print(f"{name}\n\n{overview(found, name)}\n")
    print(differences(found))
    print(f"\n{differences(found, 'again')}")
