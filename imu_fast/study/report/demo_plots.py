"""The demo's figures, drawn by matplotlib without a display."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from imu_fast.errors import check_installed
from imu_fast.storage import replacing


def new_figure(**size: Any) -> Any:
    """A matplotlib Figure, not pyplot's: no global state, no display, nothing to close."""
    check_installed("a figure", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(layout="constrained", dpi=120, **size)


def save(figure: Any, path: Path) -> str:
    """Write the figure atomically, dollars as dollars; returns the file's name."""
    check_installed("a figure", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatterMathtext, NullFormatter, StrMethodFormatter

    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for axis in axes:  # powers would be written as formulas between dollars
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
            axis.set_minor_formatter(NullFormatter())
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replacing(path) as temporary, rc_context({"text.parse_math": False}):
        figure.savefig(temporary)
    return path.name


def trajectories(path: Path, title: str, paths: dict[str, list[dict[str, float]]]) -> str:
    """Retain against forget accuracy, one line per method, read from right to left."""
    figure = new_figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for (name, records), style in zip(paths.items(), cycle(("-", "--", "-.", ":")), strict=False):
        forget = [r["forget_accuracy"] for r in records]
        retain = [r["retain_accuracy"] for r in records]
        (line,) = axes.plot(forget, retain, style, label=name, linewidth=1.8)
        axes.plot(forget[-1], retain[-1], "o", color=line.get_color())
    axes.invert_xaxis()
    axes.set_xlabel("forget accuracy (the run goes to the right)")
    axes.set_ylabel("retain accuracy")
    axes.set_title(f"Forgetting {title}: what each method keeps")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    return save(figure, path)


def histogram(path: Path, title: str, scores: Tensor) -> str:
    """How influence is spread over the forget set."""
    figure = new_figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    axes.hist(scores.cpu().numpy(), bins=30, log=True, color="#4477aa", edgecolor="white")
    axes.axvline(0, color="black", linewidth=1)
    negative = int((scores < 0).sum())
    axes.set_xlabel("influence (negative: supports forgetting)")
    axes.set_ylabel("forget samples (log scale)")
    axes.set_title(f"Forgetting {title}\n{negative} of {len(scores)} samples have influence < 0")
    return save(figure, path)


def extremes(path: Path, title: str, x: Tensor, y: Tensor, scores: Tensor, count: int = 8) -> str:
    """The images with the largest and with the smallest magnitude of influence."""
    count = min(count, len(scores) // 2)
    order = scores.abs().argsort(descending=True, stable=True)
    figure = new_figure(figsize=(1.15 * count, 3.4))
    grid = figure.subplots(2, count, squeeze=False)
    for axes_row, rows in zip(grid, (order[:count], order[-count:]), strict=True):
        for axes, i in zip(axes_row, rows.tolist(), strict=True):
            axes.imshow(x[i, 0].cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"'{int(y[i])}'  {float(scores[i]):.2g}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
    grid[0][0].set_ylabel("most", fontsize=9)
    grid[1][0].set_ylabel("least", fontsize=9)
    figure.suptitle(f"Forgetting {title}: most and least influential images", fontsize=10)
    return save(figure, path)
