"""A comparison as a terminal table, a Markdown file, plots and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from imu_fast.errors import check_installed
from imu_fast.storage import replacing
from imu_fast.study.report import plots as plots
from imu_fast.study.report.blocks import (
    METRICS,
    Block,
    Line,
    Spread,
    baseline_of,
    blocks,
    check_results,
    number,
    spread,
)

# What fits 118 columns beside the methods' names: key, heading, decimals.
_TERMINAL = (
    ("forget_accuracy", "forget", 3),
    ("retain_accuracy", "retain", 3),
    ("test_accuracy", "test", 3),
    ("auc", "AUC", 2),
    ("svc", "SVC", 2),
    ("kl", "KL", 2),
    ("relearn", "relearn", 0),
)


def comparison_table(results: dict[str, Any]) -> Table:
    """The comparison in 118 columns: a section per task and depth, best method first.

    Args:
        results: as the comparison writes them to JSON.
    """
    table = Table(
        title="Unlearning compared at matched depth",
        caption="mean±standard deviation over runs. '>': the most retain accuracy of the methods "
        "that use the forget set only and got to the depth in every run; (k/m): k of m runs did. "
        "AUC, SVC: membership attacks; KL: to the retrained model; relearn: steps until the "
        "forgotten data is back.",
        box=None,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        header_style="bold",
        caption_justify="left",
    )
    table.add_column("method", overflow="fold")
    for heading in (*(heading for _, heading, _ in _TERMINAL), "lr", "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block in blocks(results):
        table.add_row()
        table.add_row(Text(block.title, style="bold underline"))
        for line in block.lines:
            style = "bold" if line.best else "dim" if line.reference else ""
            table.add_row(
                Text(("> " if line.best else "  ") + line.name),
                *(_compact(line.values[name], digits) for name, _, digits in _TERMINAL),
                line.lr,
                "" if line.reference else _compact(Spread(line.steps.mean), 0),
                style=style,
            )
    return table


def _compact(value: Spread, digits: int) -> str:
    """As ``Spread.text``, without blanks and without the zero before a point."""
    return "±".join(p.removeprefix("0") or "0" for p in value.text(digits).split(" ± "))


def write_report(results: dict[str, Any], trajectories: dict[str, Any], out: Path) -> list[str]:
    """Write plots, ``table.md`` and ``report.html``, which needs no other file.

    Args:
        results: as the comparison writes them to JSON.
        trajectories: task -> method -> runs, each a list of (forget, retain) accuracies.
        out: the folder, made if it is missing.

    Returns:
        The names of the files written.

    Raises:
        InputError: the results lack a part, or nothing was compared.
    """
    check_results(results)
    arranged = blocks(results)
    figures = _draw(results, trajectories, arranged, out)
    for figure in figures:
        encoded = base64.b64encode((out / figure["file"]).read_bytes()).decode("ascii")
        figure["source"] = f"data:image/png;base64,{encoded}"
    with replacing(out / "table.md") as temporary:
        temporary.write_text(_markdown(results, arranged), encoding="utf-8")
    with replacing(out / "report.html") as temporary:
        temporary.write_text(_html(results, arranged, figures), encoding="utf-8")
    return [*(figure["file"] for figure in figures), "table.md", "report.html"]


def _draw(
    results: dict[str, Any], trajectories: dict[str, Any], arranged: list[Block], out: Path
) -> list[dict[str, str]]:
    """Write every plot; returns per plot its file, its section in the report and its alt text."""
    figures = []
    titles = {task: about["title"] for task, about in results["tasks"].items()}

    def add(section: str, file: str, alt: str) -> None:
        figures.append({"section": section, "file": file, "alt": alt})

    for task, title in titles.items():
        runs = trajectories.get(task, {})
        names = plots.highlighted(results, runs)
        references = next((b.references for b in arranged if b.task == task), [])
        if names:
            file = out / f"tradeoff-{plots.slug(task)}.png"
            add(
                f"tradeoff {task}",
                plots.trade_off(file, title, runs, names, references),
                f"Line plot: retain accuracy against forget accuracy while forgetting {title}, "
                f"median and band over runs, for {', '.join(names)}.",
            )
        cells = [c for c in results.get("factorial", []) if c["task"] == task]
        if cells:
            file = out / f"factorial-{plots.slug(task)}.png"
            add(
                f"factorial {task}",
                plots.factorial(file, title, cells),
                f"Heat map: retain accuracy after forgetting {title}, by trained parameters, "
                "BatchNorm mode and weights; the same numbers are in the table.",
            )
    for block in arranged:
        file = out / f"retain-{plots.slug(block.task)}-{plots.slug(block.depth)}.png"
        best = f" Best with the forget set only: {block.best.method}." if block.best else ""
        add(
            f"retain {block.task} {block.depth}",
            plots.retain_at_depth(file, block, results["rows"]),
            f"Dot plot: retain accuracy per method, {block.title}, sorted, with the original and "
            f"the retrained model as lines; the same numbers are in the table.{best}",
        )
    if results.get("correlations"):
        add(
            "correlations",
            plots.correlations(out / "correlations.png", results["correlations"], titles),
            "Heat map: Spearman correlation of each curvature's influence with exact influence; "
            "the same numbers are in the table.",
        )
    return figures


def _cells(line: Line) -> list[str]:
    """A line of the full table: reached, every metric with its mark, lr, steps, seconds."""
    return [
        "" if line.reference else f"{line.reached}/{line.runs}",
        *(
            f"{line.values[m.name].text(m.digits)} {line.marks.get(m.name, '')}".rstrip()
            for m in METRICS
        ),
        line.lr,
        "" if line.reference else line.steps.text(0),
        line.seconds.text(1),
    ]


HEADINGS = ("reached", *(m.label for m in METRICS), "lr", "steps", "seconds")


def _markdown(results: dict[str, Any], arranged: list[Block]) -> str:
    def row(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    parts = [_marks_explained(results)]
    for block in arranged:
        lines = [f"## {block.title}", "", results["depths"][block.depth], ""]
        lines.append(row(["method", *HEADINGS]))
        lines.append(row(["---", *["---:"] * len(HEADINGS)]))
        for line in block.lines:
            name = f"**{line.method}**" if line.best else line.method
            lines.append(row([name, *_cells(line)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _marks_explained(results: dict[str, Any]) -> str:
    text = (
        "Mean ± standard deviation over runs (architectures and seeds). In bold: the highest mean "
        "retain accuracy of the methods that use the forget set only and got to the depth in "
        "every run."
    )
    baseline = baseline_of(results)
    if baseline is None:
        return text
    return (
        f"{text} *: differs from {baseline} by a paired t-test, p < 0.01 after Holm's correction; "
        "**: by Wilcoxon's signed-rank test too, which needs 8 pairs or more to get there."
    )


def _overview(results: dict[str, Any], arranged: list[Block]) -> list[dict[str, str]]:
    """Per block: its best method, and how that does against the baseline."""
    name = baseline_of(results)
    tests = {
        (t["task"], t["depth"], t["method"]): t
        for t in results.get("tests", [])
        if t["baseline"] == name and t["metric"] == "retain_accuracy"
    }
    rows = []
    for block in arranged:
        best = block.best
        test = tests.get((block.task, block.depth, best.method), {}) if best else {}
        baseline = next((line for line in block.lines if line.method == name), None)
        rows.append(
            {
                "title": results["tasks"][block.task]["title"],
                "depth": block.depth,
                "method": best.method if best else "none",
                "retain": best.retain.text(3) if best else "-",
                "baseline": baseline.retain.text(3) if baseline else "-",
                "ratio": _decimals(test.get("ratio")),
                "p": _p_value(test.get("t_p_holm")),
            }
        )
    return rows


def _html(results: dict[str, Any], arranged: list[Block], figures: list[dict[str, str]]) -> str:
    check_installed("the report", "jinja2")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("imu_fast.study.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(value=_value, decimals=_decimals, p_value=_p_value, slug=plots.slug)
    return environment.get_template("report.html.j2").render(
        results=results,
        blocks=arranged,
        overview=_overview(results, arranged),
        spread=spread,
        headings=HEADINGS,
        metrics=METRICS,
        cells=_cells,
        figures={figure["section"]: figure for figure in figures},
        baseline=baseline_of(results),
        marks_explained=_marks_explained(results),
    )


def _value(value: Any) -> str:
    """A setting as plain text."""
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def _decimals(value: Any) -> str:
    return Spread(number(value)).text(3)


def _p_value(value: Any) -> str:
    p = number(value)
    return "< 0.0001" if p < 1e-4 else Spread(p).text(4)
