"""Benchmark results to one table and one figure: ``python bench/report.py``.

Reads every ``.json`` that pytest-benchmark wrote under a folder and writes ``report.md`` and
``report.png`` there: each baseline's time per sample over ours, and the fraction of its floor that
each of our operations reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

OURS = "imu_fast"


@dataclass(frozen=True)
class Timing:
    """One benchmark: seconds of a round, which gives ``samples`` results."""

    name: str
    group: str
    role: str
    device: str
    samples: int
    median: float
    q1: float
    q3: float
    minimum: float
    floor: float | None
    floor_kind: str
    against: tuple[str, ...] | None
    peak_bytes: int | None

    @property
    def per_sample(self) -> float:
        """Median seconds: baselines too slow for all samples run on fewer."""
        return self.median / self.samples

    @property
    def reached(self) -> float | None:
        """Fraction of the floor; minima of both: what another process took is in neither."""
        return None if self.floor is None else self.floor / self.minimum


def timing(entry: dict[str, Any], device: str = "") -> Timing | None:
    """From pytest-benchmark's own form; None for a benchmark that names no role."""
    extra, stats = entry["extra_info"], entry["stats"]
    if "role" not in extra or "samples" not in extra:
        return None
    return Timing(
        entry["name"],
        entry["group"],
        extra["role"],
        device,
        extra["samples"],
        *(stats[name] for name in ("median", "q1", "q3", "min")),
        extra.get("floor_s"),
        extra.get("floor", "matmul"),
        tuple(extra["against"]) if "against" in extra else None,
        extra.get("peak_bytes"),
    )


def comparisons(timings: list[Timing]) -> Iterator[tuple[Timing, list[Timing]]]:
    """Each of ours with the baselines of its group on its device, in the order of the groups."""
    for mine in sorted(timings, key=lambda t: (t.device, t.group)):
        if mine.role != OURS:
            continue
        yield (
            mine,
            [
                t
                for t in timings
                if (t.group, t.device) == (mine.group, mine.device)
                and t.role != OURS
                and (mine.against is None or t.role in mine.against)
            ],
        )


def read(folder: Path) -> list[Timing]:
    """Timings of all results under ``folder``; files of another form are left out.

    Raises:
        typer.BadParameter: there are none.
    """
    found = []
    for file in sorted(folder.rglob("*.json")):
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or "benchmarks" not in content:
            continue
        device = content.get("machine_info", {}).get("imu_fast", {}).get("device", "unknown")
        found += [t for entry in content["benchmarks"] if (t := timing(entry, device))]
    if not found:
        raise typer.BadParameter(
            f"no pytest-benchmark results under {folder}; `make bench` writes some"
        )
    return found


HEADINGS = ("group", "device", "role", "ms", "quartiles", "time / ours", "of floor", "peak MB")


def row(mine: Timing, one: Timing) -> tuple[str, ...]:
    """Of the table: ``one`` beside ours."""
    return (
        mine.group,
        mine.device,
        one.role if one.role in one.name or one.role != OURS else one.name,
        f"{1e3 * one.median:.3f}",
        f"{1e3 * one.q1:.3f} - {1e3 * one.q3:.3f}",
        f"{one.per_sample / mine.per_sample:.2f}",
        "" if one.reached is None else f"{100 * one.reached:.0f} % ({one.floor_kind})",
        "" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.0f}",
    )


def rows(timings: list[Timing]) -> list[tuple[str, ...]]:
    return [row(mine, one) for mine, rest in comparisons(timings) for one in (mine, *rest)]


def markdown(timings: list[Timing]) -> str:
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows(timings)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def print_table(timings: list[Timing]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADINGS, title="medians per round; time / ours is per sample")
    for line in rows(timings):
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log's lines may be long
    console.print(table)


def draw(path: Path, timings: list[Timing]) -> None:
    """Above: a bar per baseline, its time per sample over ours. Below: fractions of the floors."""
    from imu_fast.study.report.demo_plots import new_figure, save

    compared = list(comparisons(timings))
    pairs = [
        (f"{mine.group}: {other.role}", other.per_sample / mine.per_sample)
        for mine, others in compared
        for other in others
    ]
    floors = [(mine.group, mine.reached) for mine, _ in compared if mine.reached is not None]
    heights = [1 + len(pairs), 1 + len(floors)]
    figure = new_figure(figsize=(10, 1.5 + 0.17 * sum(heights)))
    above, below = figure.subplots(2, 1, height_ratios=heights)
    for axes, bars in ((above, pairs), (below, floors)):
        for i, (_, value) in enumerate(bars):
            # From 1, where both take as long: to the right ours is faster.
            left = 1 if axes is above else 0
            axes.barh(
                i, value - left, 0.7, left=left, color="#4477aa" if value >= left else "#cc6677"
            )
            # Right of a bar that grows to the right; before the line where it would cross it.
            crosses = axes is below and 0.9 < value < 1
            side, shift = ("left", 3) if value >= left and not crosses else ("right", -3)
            text = f"{value:.3g}" if axes is above else f"{100 * value:.0f} %"
            axes.annotate(
                text,
                (value, i),
                (shift, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                size=6,
            )
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=6)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.axvline(1, color="black", linewidth=1)
        axes.margins(x=0.12)
    above.set_xscale("log")
    above.xaxis.set_major_formatter("{x:g}")
    above.set_xlabel("baseline's time per sample / ours (log scale; right of 1: ours is faster)")
    below.set_xlabel("fraction of the floor reached")
    figure.suptitle("imu_fast on " + ", ".join(sorted({mine.device for mine, _ in compared})))
    save(figure, path)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the .json files are.")] = Path(
        "bench/results"
    ),
    out: Annotated[Path | None, typer.Option(help="Folder of the report, if another.")] = None,
) -> None:
    """Write report.md and report.png, and print the table."""
    from imu_fast.storage import replacing

    timings, out = read(folder), out or folder
    with replacing(out / "report.md") as path:
        path.write_text(markdown(timings))
    draw(out / "report.png", timings)
    print_table(timings)


if __name__ == "__main__":
    typer.run(main)
