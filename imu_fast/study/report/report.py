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
from imu_fast.study.entries import AUTO, ORIGINAL, RETRAINED
from imu_fast.study.report import plots as plots
from imu_fast.study.report.blocks import (
    METRICS,
    Block,
    Line,
    Spread,
    blocks,
    check_results,
    drawn,
    factorial,
    points,
    spread,
    verdicts,
)
from imu_fast.study.report.escapes import markdown_text, utf8

# What fits 118 columns beside the methods' names: key, heading, decimals.
_TERMINAL = (
    ("gap", "gap", 3),
    ("kl_forget", "KL", 2),
    ("forget_accuracy", "forget", 3),
    ("retain_accuracy", "retain", 3),
    ("test_accuracy", "test", 3),
    ("membership", "memb.", 2),
    ("relearn", "relearn", 0),
)
# What a card shows at once; the other metrics are behind it.
_CARD = ("gap", "kl_forget", "forget_accuracy", "retain_accuracy", "test_accuracy", "membership")
# Methods with a card of their own, best first; the others are behind "all methods".
_CARDS = 8


def comparison_table(results: dict[str, Any]) -> Table:
    """The comparison in 118 columns: a section per task and depth, nearest to retraining first.

    Args:
        results: as the comparison returns them.
    """
    table = Table(
        title="Unlearning compared with retraining, at matched depth",
        caption="mean±standard deviation over runs. gap: mean difference to the retrained model in "
        "forget, retain and test accuracy and members; KL: to it, on the forget set (random flips "
        "show that the gap alone can be gamed). '>': the nearest that uses the forget set only and "
        "got to the depth in every run; at 'half', which retraining does not reach, the one that "
        "keeps most; (k/m): k of m runs did; [k of m]: run on k of m models yet. "
        "memb.: fraction that an attack calls training data; "
        "relearn: steps until the forgotten is back.",
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
                Text(line.lr),
                "" if line.reference else _compact(Spread(line.steps.mean), 0),
                style=style,
            )
    return table


def _compact(value: Spread, digits: int) -> str:
    """As ``Spread.text``, without blanks and without the zero before a point."""
    return "±".join(p.removeprefix("0") or "0" for p in value.text(digits).split(" ± "))


def write_report(results: dict[str, Any], out: Path) -> list[str]:
    """Write plots, ``table.md`` and ``report.html``, which needs no other file.

    Args:
        results: as the comparison returns them.
        out: the folder, made if it is missing.

    Returns:
        The names of the files written.

    Raises:
        InputError: the results lack a part, or nothing was compared.
    """
    check_results(results)
    arranged = blocks(results)
    figures = _draw(results, arranged, out)
    for figure in figures:
        encoded = base64.b64encode((out / figure["file"]).read_bytes()).decode("ascii")
        figure["source"] = f"data:image/png;base64,{encoded}"
    with replacing(out / "table.md") as temporary:
        temporary.write_bytes(utf8(_markdown(results, arranged)))
    with replacing(out / "report.html") as temporary:
        temporary.write_bytes(utf8(_html(results, arranged, figures)))
    return [*(figure["file"] for figure in figures), "table.md", "report.html"]


def _draw(results: dict[str, Any], arranged: list[Block], out: Path) -> list[dict[str, str]]:
    """Write every plot; returns per plot its file, its section in the report and its alt text."""
    figures = []
    titles = {task: about["title"] for task, about in results["tasks"].items()}

    def add(section: str, file: str, alt: str) -> None:
        figures.append({"section": section, "file": file, "alt": alt})

    for task, title in titles.items():
        mine = [b for b in arranged if b.task == task]
        runs = {name: points(results, task, name) for name in drawn(results, arranged, task)}
        runs = {name: those for name, those in runs.items() if those}
        if runs:
            ends = [line for name in (ORIGINAL, RETRAINED) if (line := mine[0].line(name))]
            file = out / f"tradeoff-{plots.slug(task)}.png"
            add(
                f"tradeoff {task}",
                plots.trade_off(file, title, runs, ends),
                f"Line plot: retain accuracy against forget accuracy while forgetting {title}, "
                f"mean and band over runs, for {', '.join(runs)}.",
            )
        panels = [(block, cells) for block in mine if (cells := factorial(block))]
        if panels:
            file = out / f"factorial-{plots.slug(task)}.png"
            add(
                f"factorial {task}",
                plots.factorial(file, title, panels),
                f"Heat map: after forgetting {title}, by trained parameters, BatchNorm mode and "
                "weights; the same numbers are in the table.",
            )
    for block in arranged:
        file = out / f"ranked-{plots.slug(block.task)}-{plots.slug(block.depth)}.png"
        best = f" Best with the forget set only: {block.best.method}." if block.best else ""
        add(
            f"ranked {block.task} {block.depth}",
            plots.at_depth(file, block, results["rows"]),
            f"Dot plot: {block.ranked_by.label} per method, {block.title}, best first, with the "
            f"original and the retrained models as lines; the same numbers are in the table.{best}",
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
    """A line of the full table: reached, every metric, lr, steps, seconds."""
    return [
        "" if line.reference else f"{line.reached}/{line.runs}",
        *(line.values[m.name].text(m.digits) for m in METRICS),
        line.lr,
        "" if line.reference else line.steps.text(0),
        line.seconds.text(1),
    ]


HEADINGS = ("reached", *(m.label for m in METRICS), "lr", "steps", "seconds")


def _markdown(results: dict[str, Any], arranged: list[Block]) -> str:
    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    parts = [_explained(results, arranged)]
    for block in arranged:
        title, depth = map(markdown_text, (block.title, results["depths"][block.depth]))
        lines = [f"## {title}", "", depth, ""]
        lines.append(row(["method", *HEADINGS]))
        lines.append(row(["---", *["---:"] * len(HEADINGS)]))
        for line in block.lines:
            name, *cells = map(markdown_text, (line.name, *_cells(line)))
            lines.append(row([f"**{name}**" if line.best else name, *cells]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _explained(results: dict[str, Any], arranged: list[Block]) -> str:
    planned = results["planned"]["cells"]
    cells = {(r["arch"], r["seed"], r["task"]) for r in results["rows"]}
    text = (
        "Mean ± standard deviation over runs (architectures and seeds). Methods are ordered by the "
        "average gap to the retrained model, at the stress test by retain accuracy. In bold: the "
        "first that uses the forget set only and got to the depth in every run."
    )
    if len(cells) < planned:
        text += f" Not finished: {len(cells)} of {planned} models and tasks are measured."
    if any(line.partial for block in arranged for line in block.lines):
        text += (
            " [k of m]: a method that has run on k of the m models yet; its means are not over the "
            "same models as the others', and it is not called the best."
        )
    return text


def _overview(results: dict[str, Any], arranged: list[Block]) -> list[dict[str, Any]]:
    """Per block: who is nearest, and whether the recipe is nearer than doing nothing, in words."""
    rows = []
    for block in arranged:
        best, recipe = block.best, block.line(AUTO)
        metric = block.ranked_by
        said = [text for question, method, text in verdicts(results, block) if method == AUTO]
        rows.append(
            {
                "title": results["tasks"][block.task]["title"],
                "depth": block.depth,
                "metric": metric.label,
                "best": best,
                "best_value": best.values[metric.name].text(metric.digits) if best else "-",
                "recipe": recipe.gap.text(3) if recipe else None,
                "floors": [(line.method, line) for line in block.references],
                "verdict": said[0] if said else None,
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
    environment.filters.update(value=_value, slug=plots.slug)
    return environment.get_template("report.html.j2").render(
        results=results,
        blocks=arranged,
        count=sum(about["forget_only"] for about in results["methods"].values()),
        overview=_overview(results, arranged),
        spread=spread,
        metrics=METRICS,
        card=[m for m in METRICS if m.name in _CARD],
        cards=_CARDS,
        figures={figure["section"]: figure for figure in figures},
        verdicts=lambda block: list(verdicts(results, block)),
        explained=_explained(results, arranged),
    )


def _value(value: Any) -> str:
    """A setting as plain text."""
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
