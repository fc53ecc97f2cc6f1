"""The comparison's figures. Colours: Okabe and Ito's, told apart by the colour-blind too."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imu_fast.study.report.blocks import Block, Line, number, spread
from imu_fast.study.report.demo_plots import new_figure, save

Run = Sequence[tuple[float, float]]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_GREY = "#666666"
_MOST_LINES = 6


def slug(text: str) -> str:
    """The text as part of a file name."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def highlighted(results: dict[str, Any], runs: dict[str, list[Run]]) -> list[str]:
    """Methods whose trajectories are drawn: ``config["highlight"]``, else the first six."""
    wanted = results["config"].get("highlight") or list(runs)[:_MOST_LINES]
    return [name for name in wanted if runs.get(name)]


def on_grid(run: Run, grid: np.ndarray) -> np.ndarray:
    """Retain accuracy when a run first gets to each forget accuracy of the grid.

    Forget accuracy need not fall in every step, so only a run's successive minima count, with
    straight lines between them.

    Args:
        run: (forget accuracy, retain accuracy) per step.
        grid: ascending [m].

    Returns:
        [m], NaN above the run's first and below its lowest forget accuracy.
    """
    path = np.asarray(run, dtype=np.float64).reshape(-1, 2)
    path = path[np.isfinite(path).all(axis=1)]
    if len(path) == 0:
        return np.full(len(grid), np.nan)
    lowest = np.minimum.accumulate(path[:, 0])
    new = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    forget, retain = path[new].T[:, ::-1]
    return np.interp(grid, forget, retain, left=np.nan, right=np.nan)


def band(runs: list[Run], grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """10 % quantile, median and 90 % quantile over runs, where at least half of them have come.

    Returns:
        Three arrays [m], NaN where fewer have.
    """
    values = np.stack([on_grid(run, grid) for run in runs])
    enough = 2 * np.isfinite(values).sum(axis=0) >= len(runs)
    result = np.full((3, len(grid)), np.nan)
    result[:, enough] = np.nanquantile(values[:, enough], (0.1, 0.5, 0.9), axis=0)
    return result[0], result[1], result[2]


def trade_off(
    path: Path, title: str, runs: dict[str, list[Run]], names: list[str], references: list[Line]
) -> str:
    """Retain against forget accuracy: median and 10-90 % band over runs, read left to right.

    Args:
        runs: per method, its runs.
        names: the methods to draw.
        references: drawn as points.
    """
    figure = new_figure(figsize=(8, 5.4))
    axes = figure.subplots()
    grid = np.linspace(0, 1, 1001)
    for i, name in enumerate(names):
        colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
        low, middle, high = band(runs[name], grid)
        axes.plot(grid, middle, dash, color=colour, linewidth=1.8, label=name)
        axes.fill_between(grid, low, high, color=colour, alpha=0.13, linewidth=0)
    for line, marker in zip(references, "*X", strict=False):
        forget = line.values["forget_accuracy"]
        axes.errorbar(
            forget.mean,
            line.retain.mean,
            xerr=_whisker(forget.std),
            yerr=_whisker(line.retain.std),
            fmt=marker,
            color="black",
            markersize=11,
            elinewidth=1,
            label=line.method,
            zorder=5,
        )
    axes.invert_xaxis()
    axes.set_xlabel("forget accuracy (runs go to the right)")
    axes.set_ylabel("retain accuracy")
    count = max((len(runs[name]) for name in names), default=0)
    over = f"median and 10-90 % of {count} runs" if count > 1 else "one run"
    axes.set_title(f"Forgetting {title}: what is kept ({over})")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return save(figure, path)


def retain_at_depth(path: Path, block: Block, rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of retain accuracy per method, sorted; runs as faint dots."""
    methods = block.methods
    figure = new_figure(figsize=(8, 1.7 + 0.27 * len(methods)))
    axes = figure.subplots()
    for line, style in zip(block.references, ("--", "-"), strict=False):
        axes.axvline(line.retain.mean, color="black", linestyle=style, linewidth=1)
        axes.plot([], [], style, color="black", linewidth=1, label=line.method)
    kinds = {
        True: ("o", _COLOURS[0], "forget set only"),
        False: ("s", _COLOURS[1], "retain data too"),
    }
    seen = set()
    for y, line in enumerate(methods):
        values = [
            number(r["retain_accuracy"])
            for r in rows
            if (r["task"], r["depth"], r["method"]) == (block.task, block.depth, line.method)
            and r["reached"]
        ]
        marker, colour, label = kinds[line.forget_only]
        axes.plot(values, [y + 0.3] * len(values), ".", color=colour, alpha=0.4, markersize=3.5)
        if line.reached == 0 or math.isnan(line.retain.mean):
            # In axes' own units across: the text must not stretch the scale.
            across = axes.get_yaxis_transform()
            axes.text(
                0.01, y, "depth not reached", transform=across, va="center", fontsize=8, color=_GREY
            )
            continue
        axes.errorbar(
            line.retain.mean,
            y,
            xerr=_whisker(line.retain.std),
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=2.5,
            markerfacecolor=colour if line.reached == line.runs else "white",
            label=None if label in seen else label,
        )
        seen.add(label)
    if any(0 < line.reached < line.runs for line in methods):
        label = "depth reached in some runs only"
        axes.plot([], [], "o", color=_GREY, markerfacecolor="white", label=label)
    axes.set_yticks(range(len(methods)), [line.name for line in methods], fontsize=8)
    for label, line in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if line.best else "normal")
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("retain accuracy: mean ± standard deviation over runs")
    axes.set_title(block.title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return save(figure, path)


def factorial(path: Path, title: str, cells: list[dict[str, Any]]) -> str:
    """Retain accuracy by what is trained, BatchNorm's mode and the weights; a panel per depth."""
    rows = _unique((c["trained"], c["batchnorm"]) for c in cells)
    columns = _unique(c["weights"] for c in cells)
    depths = _unique(c["depth"] for c in cells)
    figure = new_figure(
        figsize=(2.3 + 1.25 * len(columns) * len(depths), 1.9 + 0.6 * len(rows)),
    )
    panels = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    grids = np.full((len(depths), len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, int, int], str] = {}
    for c in cells:
        at = (
            depths.index(c["depth"]),
            rows.index((c["trained"], c["batchnorm"])),
            columns.index(c["weights"]),
        )
        grids[at] = number(c["retain_mean"])
        texts[at] = spread(c, "retain").text(3).replace(" ± ", "\n± ")
    limits = _limits(grids)
    for d, axes in enumerate(panels):
        image = _heat_map(axes, grids[d], {k[1:]: t for k, t in texts.items() if k[0] == d}, limits)
        axes.set_title(f"depth: {depths[d]}", fontsize=9)
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_xlabel("weights", fontsize=9)
    names = [f"{trained}, BatchNorm {mode}" for trained, mode in rows]
    panels[0].set_yticks(range(len(rows)), names, fontsize=8)
    figure.colorbar(image, ax=list(panels), label="retain accuracy")
    figure.suptitle(f"Forgetting {title}: parameters by BatchNorm by weights", fontsize=10)
    return save(figure, path)


def correlations(path: Path, entries: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """Spearman correlation of each curvature's influence with the exact one's."""
    rows = _unique((e["task"], e["arch"]) for e in entries)
    columns = _unique(e["curvature"] for e in entries)
    grid = np.full((len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, ...], str] = {}
    for e in entries:
        at = rows.index((e["task"], e["arch"])), columns.index(e["curvature"])
        grid[at] = number(e["spearman_mean"])
        texts[at] = spread(e, "spearman").text(2).replace(" ± ", "\n± ")
    figure = new_figure(figsize=(3 + 0.95 * len(columns), 1.6 + 0.45 * len(rows)))
    axes = figure.subplots()
    image = _heat_map(axes, grid, texts, (-1, 1), colours="PuOr")
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=30, ha="right")
    names = [f"{titles.get(task, task)}, {arch}" for task, arch in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    figure.colorbar(image, ax=axes, label="Spearman")
    axes.set_title("Rank correlation with exact influence", fontsize=10)
    return save(figure, path)


def _heat_map(
    axes: Any,
    grid: np.ndarray,
    texts: dict[tuple[int, ...], str],
    limits: tuple[float, float],
    colours: str = "cividis",
) -> Any:
    """Colour a grid and write its values on it, in what can be read on each colour."""
    image = axes.imshow(grid, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_facecolor("#eeeeee")  # cells without a value
    for (y, x), text in texts.items():
        red, green, blue, _ = image.cmap(image.norm(grid[y, x]))
        # Below this brightness white text has the higher contrast.
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.46 and np.isfinite(grid[y, x])
        axes.text(
            x, y, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black"
        )
    return image


def _limits(grid: np.ndarray) -> tuple[float, float]:
    known = grid[np.isfinite(grid)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _unique(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))


def _whisker(std: float) -> float | None:
    return None if math.isnan(std) else std
