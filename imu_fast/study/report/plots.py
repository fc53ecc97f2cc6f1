"""The comparison's figures. Colours: Okabe and Ito's, told apart by the colour-blind too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imu_fast.study.report.blocks import Block, Cell, Line, number, spread
from imu_fast.study.report.demo_plots import new_figure, save

Run = Sequence[tuple[float, float]]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "os^vDP*"
_GREY = "#666666"


def slug(text: str) -> str:
    """The text as part of a file name."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def stages(runs: Sequence[Run]) -> np.ndarray:
    """Means over runs, and 10 and 90 % quantiles of what is kept, at each bisected depth.

    Args:
        runs: (forget accuracy, retain accuracy) at the same depths each.

    Returns:
        [depths, 4]: mean forget accuracy, mean retain accuracy, low and high of it.
    """
    values = np.asarray(runs, dtype=np.float64)  # [runs, depths, 2]
    retain = values[..., 1]
    low, high = np.quantile(retain, (0.1, 0.9), axis=0)
    return np.stack([values[..., 0].mean(axis=0), retain.mean(axis=0), low, high], axis=1)


def trade_off(
    path: Path, title: str, runs: Mapping[str, Sequence[Run]], references: Sequence[Line]
) -> str:
    """Retain against forget accuracy through bisected depths, the means of the tables.

    Args:
        runs: per method, its runs, see :func:`imu_fast.study.report.blocks.points`.
        references: drawn as points, with standard deviations.
    """
    figure = new_figure(figsize=(7, 5.6))
    axes = figure.subplots()
    count = max((len(those) for those in runs.values()), default=0)
    for i, (name, those) in enumerate(runs.items()):
        few = f" [{len(those)} of {count}]" if len(those) < count else ""
        colour = _COLOURS[i % len(_COLOURS)]
        forget, retain, low, high = stages(those).T
        style = f"{_MARKERS[i % len(_MARKERS)]}{_DASHES[i % len(_DASHES)]}"
        axes.plot(
            forget, retain, style, color=colour, linewidth=1.8, markersize=5, label=name + few
        )
        axes.fill_between(forget, low, high, color=colour, alpha=0.13, linewidth=0)
    for line, marker in zip(references, "*X", strict=False):
        forget_accuracy = line.values["forget_accuracy"]
        axes.errorbar(
            forget_accuracy.mean,
            line.retain.mean,
            xerr=_whisker(forget_accuracy.std),
            yerr=_whisker(line.retain.std),
            fmt=marker,
            color="black",
            markersize=11,
            elinewidth=1,
            label=line.method,
            zorder=5,
        )
    axes.invert_xaxis()
    axes.set_xlabel("forget accuracy (runs go to the right)", fontsize=12)
    axes.set_ylabel("retain accuracy", fontsize=12)
    over = f"mean and 10-90 % of {count} runs" if count > 1 else "one run"
    axes.set_title(f"Forgetting {title}: what is kept\n({over})", fontsize=13)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    return save(figure, path)


def at_depth(path: Path, block: Block, rows: list[dict[str, Any]], most: int = 14) -> str:
    """What a block is ranked by, per method, best first: mean and deviation; runs as faint dots.

    Args:
        most: methods that are drawn; ``auto`` is, wherever it stands.
    """
    metric = block.ranked_by
    methods = [line for i, line in enumerate(block.methods) if i < most or line.method == "auto"]
    figure = new_figure(figsize=(7, 2.0 + 0.33 * len(methods)))
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for line, style in zip(block.references, styles, strict=False):
        value = line.values[metric.name].mean
        if math.isnan(value):
            continue
        axes.axvline(value, color="black", linestyle=style, linewidth=1)
        axes.plot([], [], style, color="black", linewidth=1, label=line.method)
    for y, line in enumerate(methods):
        values = [
            number(r[metric.name])
            for r in rows
            if (r["task"], r["depth"], r["method"]) == (block.task, block.depth, line.method)
            and r["reached"]
        ]
        colour = _COLOURS[1] if line.method == "auto" else _COLOURS[0]
        axes.plot(values, [y + 0.3] * len(values), ".", color=colour, alpha=0.4, markersize=3.5)
        spread_of = line.values[metric.name]
        if line.reached == 0 or math.isnan(spread_of.mean):
            # In axes' own units across: the text must not stretch the scale.
            across = axes.get_yaxis_transform()
            axes.text(
                0.01, y, "depth not reached", transform=across, va="center", fontsize=9, color=_GREY
            )
            continue
        axes.errorbar(
            spread_of.mean,
            y,
            xerr=_whisker(spread_of.std),
            fmt="o",
            color=colour,
            markersize=6,
            capsize=2.5,
            markerfacecolor=colour if line.reached == line.runs else "white",
        )
    if any(0 < line.reached < line.runs for line in methods):
        label = "depth reached in some runs only"
        axes.plot([], [], "o", color=_GREY, markerfacecolor="white", label=label)
    axes.set_yticks(range(len(methods)), [line.name for line in methods], fontsize=10)
    for label, line in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if line.best or line.method == "auto" else "normal")
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    meaning = metric.meaning.split(":")[0]
    # On two lines: the axis is narrow beside long names.
    axes.set_xlabel(f"{meaning}\nmean ± standard deviation", fontsize=11)
    axes.set_title(block.title, fontsize=12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    return save(figure, path)


def factorial(path: Path, title: str, panels: Sequence[tuple[Block, list[Cell]]]) -> str:
    """What each depth is ranked by, by what is trained, BatchNorm's mode and the weights."""
    every = [cell for _, cells in panels for cell in cells]
    rows = _unique((c.trained, c.batchnorm) for c in every)
    columns = _unique(c.weights for c in every)
    figure = new_figure(
        figsize=(2.3 + 1.35 * len(columns) * len(panels), 1.9 + 0.65 * len(rows)),
    )
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (block, cells) in zip(all_axes, panels, strict=True):
        metric = block.ranked_by
        grid = np.full((len(rows), len(columns)), np.nan)
        texts: dict[tuple[int, ...], str] = {}
        for c in cells:
            at = rows.index((c.trained, c.batchnorm)), columns.index(c.weights)
            value = c.line.values[metric.name]
            grid[at] = value.mean
            texts[at] = value.text(3).replace(" ± ", "\n± ")
            if c.line.partial:
                texts[at] += f"\n[{c.line.runs} of {c.line.models}]"
        better_low = metric.name == "gap"
        _heat_map(axes, grid, texts, _limits(grid), "cividis_r" if better_low else "cividis")
        axes.set_title(f"depth {block.depth}: {metric.label}", fontsize=10)
        axes.set_xticks(range(len(columns)), columns, fontsize=9)
        axes.set_xlabel("weights", fontsize=10)
    names = [f"{trained}, BatchNorm {mode}" for trained, mode in rows]
    all_axes[0].set_yticks(range(len(rows)), names, fontsize=9)
    figure.suptitle(f"Forgetting {title}: parameters by BatchNorm by weights", fontsize=11)
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
