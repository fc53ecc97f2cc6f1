"""Tables for the terminal, drawn by rich."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def demo_table(results: dict[str, Any]) -> Table:
    """The demo's one table, from what ``demo.run`` returned."""
    depths = "; ".join(
        f"{name} ({results['sizes'][name]} images): to {depth}"
        for name, depth in results["depth"].items()
    )
    table = Table(
        title="Unlearning digits, every method stopped at the same depth",
        caption=f"{depths}. {results['rule'].capitalize()}. member: fraction "
        "of the forget set that a membership attack calls training data. test: classes that are "
        "kept. gap: mean difference to the retrained model in these four, in points. KL: to it, on "
        "the forget set; random flips show that the gap alone can be gamed.",
    )
    table.add_column("method", no_wrap=True)
    for name in ("forget", "retain", "test", "member", "gap", "KL", "lr", "steps", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in results["rows"]:
        if row["task"] != previous:
            table.add_section()
            table.add_row(f"[bold]{row['task']}[/bold]")
            previous = row["task"]
        accuracies = [_cell(row[k], ".3f") for k in ("forget", "retain", "test", "member")]
        table.add_row(
            f"  {row['method']}",
            *accuracies,
            f"{100 * row['gap']:.1f}",
            f"{row['kl']:.2f}",
            _cell(row["lr"], "g"),
            _cell(row["steps"], "d"),
            _cell(row["seconds"], ".2f"),
        )
    return table


def key_value_table(title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> Table:
    """A plain table of strings, as they are: what is in brackets is no markup."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
