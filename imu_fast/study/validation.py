"""``imu-fast validate``: :func:`imu_fast.validate` on digits or CIFAR-10, with table and figure."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import imu_fast
from imu_fast.errors import check_choice, check_count, check_seed
from imu_fast.evaluation.validate import validate
from imu_fast.storage import replacing
from imu_fast.study.cells import rounded
from imu_fast.study.data.tasks import Samples, load_dataset
from imu_fast.study.networks import train, train_small_network
from imu_fast.study.report.demo_plots import new_figure, save
from imu_fast.study.report.escapes import markdown_text

# Per data set: training samples, queries, epochs, and the layers beside the head.
_SIZES: dict[str, dict[str, Any]] = {
    "digits": {"samples": None, "queries": 180, "epochs": 20, "layers": ["0", "3", "8", "10"]},
    "cifar10": {"samples": 2000, "queries": 300, "epochs": 20, "layers": None},
}


def _digits_network(epochs: int, samples: Samples, seed: int) -> torch.nn.Module:
    return train_small_network(samples, seed, epochs)


def _cifar_network(epochs: int, samples: Samples, seed: int) -> torch.nn.Module:
    return train("vgg", samples, 10, seed=seed, epochs=epochs, batch_size=64, mirror=True)


def run(
    data: str,
    out: Path,
    *,
    data_path: Path | None = None,
    subsets: int = 50,
    repeats: int = 2,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Validate on a data set; writes ``results.json``, ``table.md`` and ``lds.png`` into ``out``.

    What was retrained is kept in its ``cache``; an interrupted run goes on from there.

    Args:
        data: "digits" or "cifar10" (with ``data_path``).
        quick: few samples, queries and epochs, for a first look; its numbers say little.

    Raises:
        InputError: unknown data, missing files, counts below 1.
    """
    check_choice("data", data, _SIZES)
    check_count("subsets", subsets)
    seed = check_seed("seed", seed)
    size = dict(_SIZES[data])
    if quick:
        size |= {"samples": 300, "queries": 40, "epochs": 3, "layers": None}
    started = time.perf_counter()
    loaded = load_dataset(data, data_path, size["samples"], seed)
    queries = tuple(part[: size["queries"]] for part in loaded.test)
    fit = _digits_network if data == "digits" else _cifar_network
    found = validate(
        partial(fit, size["epochs"]),
        loaded.train,
        (queries[0], queries[1]),
        subsets=subsets,
        repeats=repeats,
        seed=seed,
        layers=size["layers"],
        folder=out / "cache",
        progress=progress,
    )
    results = rounded(
        {"data": data, "seed": seed, "quick": quick, "settings": size, **asdict(found)}
        | {"seconds": time.perf_counter() - started}
        | {
            "versions": {
                "imu_fast": imu_fast.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            }
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    _figure(out / "lds.png", results)
    for name, text in (
        ("results.json", json.dumps(results, indent=1) + "\n"),
        ("table.md", markdown(results)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return dict(results)


def _ordered(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Candidates with both measures, the best linear datamodeling score first."""
    alone = {row["candidate"]: row for row in results["memorisation"]}
    rows = sorted(results["lds"], key=lambda row: -(row["lds"] or 0))
    return [row | {"memorisation": alone.get(row["candidate"], {})} for row in rows]


def _cells(row: dict[str, Any]) -> list[str]:
    alone = row["memorisation"]
    spearman = alone.get("spearman")
    memorised = "" if spearman is None else f"{spearman:.2f}"
    setting = alone.get("setting") or ""
    return [
        row["candidate"],
        row["setting"],
        "-" if row["lds"] is None else f"{row['lds']:.3f}",
        "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
        f"{memorised} ({setting})" if setting and memorised else memorised,
    ]


_HEADINGS = ("scores", "setting", "LDS", "95 %", "memorisation")


def _caption(results: dict[str, Any]) -> str:
    each = "one model" if results["repeats"] == 1 else f"{results['repeats']} models"
    return (
        f"{results['data']}: {results['samples']} training samples, {results['subsets']} random "
        f"halves, {each} each, {results['queries']} queries. LDS: Spearman "
        "correlation of summed scores with the losses of the retrained models. memorisation: "
        "Spearman correlation of a sample's own score with how much its loss rises without it. "
        "Settings were chosen on one half (of the queries, of the samples), these numbers are of "
        "the other."
    )


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [markdown_text(_caption(results)), "", "| " + " | ".join(_HEADINGS) + " |"]
    lines.append("| --- | --- | ---: | :---: | :--- |")
    lines += [
        "| " + " | ".join(map(markdown_text, _cells(row))) + " |" for row in _ordered(results)
    ]
    return "\n".join(lines) + "\n"


def validation_table(results: dict[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(title="Do scores predict retraining?", caption=_caption(results))
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading == "LDS" else "left")
    for row in _ordered(results):
        table.add_row(*_cells(row))
    return table


def _figure(path: Path, results: dict[str, Any]) -> str:
    rows = [row for row in _ordered(results) if row["lds"] is not None]
    figure = new_figure(figsize=(7, 1.4 + 0.34 * len(rows)))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        whisker = None
        if row["low"] is not None:
            whisker = [[row["lds"] - row["low"]], [row["high"] - row["lds"]]]
        axes.errorbar(row["lds"], y, xerr=whisker, fmt="o", color="#0072b2", capsize=2.5)
    names = [f"{r['candidate']} ({r['setting']})" if r["setting"] else r["candidate"] for r in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("LDS: mean and 95 % interval over queries")
    axes.set_title(f"{results['data']}: do scores predict retraining?")
    return save(figure, path)
