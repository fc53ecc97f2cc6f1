"""How cost and memory grow with samples, words and devices: ``python bench/growth.py --measure``.

Predicted: seconds and bytes resident per process of scoring at a head (one pass, from features to
scores) and of an ascent run there, from counted FLOPs and bytes (growth_model.py) over rates that
are measured here. Checked: whatever two cores can run in a minute or two, predicted beside
measured (growth_checks.py). Writes ``growth.json`` and ``growth.png``, and the page docs/growth.md;
without ``--measure`` from the results that are there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from growth_model import (
    ASSUMED_ITERATIONS,
    BATCH,
    EPOCHS,
    MAX_GATHERED,
    METHODS,
    Estimate,
    Job,
    Rates,
    estimate,
    seconds,
)

from imu_fast.check.counts import Ceilings
from imu_fast.storage import replacing

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "growth.md"
# Classes and features: a ResNet-18 and a ResNet-50; of language models a small and a large
# vocabulary.
HEADS = ((10, 512), (100, 512), (1_000, 2_048), (32_000, 2_048), (256_000, 2_048))
SAMPLES = tuple(10**k for k in range(3, 10))
DEVICES = (1, 8, 64)
# Bytes a second between devices, stated: 100 Gbit/s.
LINK = 12.5e9
# Below this what is measured is overhead of calls more than work.
SHORT = 0.05
# Of the figure's axes: seconds, and GiB.
TIMES = {"10 ms": 0.01, "0.1 s": 0.1, "1 s": 1, "10 s": 10, "1 min": 60, "10 min": 600}
TIMES |= {"2 h": 7_200, "1 day": 86_400, "10 days": 864_000, "100 days": 8.64e6, "10 years": 3.2e8}
SIZES = {"10 MiB": 10 / 2**10, "100 MiB": 100 / 2**10, "1 GiB": 1, "10 GiB": 10, "100 GiB": 100}
SIZES |= {"1 TiB": 2**10, "10 TiB": 10 * 2**10}
CHECKS = [
    *(Job(m, n, 10, 512) for m in METHODS for n in (1_000, 10_000, 100_000)),
    *(Job(m, 1_000_000, 10, 512) for m in ("fisher_diag", "kfac", "ggn")),
    *(Job(m, n, 100, 512) for m in METHODS for n in (1_000, 30_000)),
    Job("fisher_diag", 1_000_000, 100, 512),
    *(Job(m, n, 1_000, 2_048) for m in METHODS for n in (1_000, 10_000)),
    *(Job(m, 30_000, 100, 512, 2) for m in ("fisher_diag", "kfac", "ggn")),
    *(Job(m, 1_000, 32_000, 2_048) for m in ("fisher_diag", "ggn", "ascent")),
    Job("fisher_diag", 1_000, 256_000, 2_048),
]


def jobs() -> Iterator[Job]:
    """Of the table."""
    for classes, d in HEADS:
        for method in METHODS:
            for n in SAMPLES:
                for devices in DEVICES:
                    yield Job(method, n, classes, d, devices)


def rates_of(found: dict[str, Any], results: dict[str, Any], link: float | None = None) -> Rates:
    """As a process of growth_checks.py says them."""
    work = Ceilings(found["bytes"], found["flops"])
    between = link or found["link"] or results["link"]
    more = between, found["fixed"], results["narrow"]
    return Rates(work, found["disk"] or math.inf, results["memory"], *more)


def typical(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rates of several processes."""

    def middle(*path: str) -> Any:
        found = []
        for one in each:
            value: Any = one
            for key in path:
                value = value[key]
            if value is not None:
                found.append(value)
        return median(found) if found else None

    return {
        "bytes": middle("bytes"),
        "flops": {kind: middle("flops", kind) for kind in each[0]["flops"]},
        "disk": middle("disk"),
        "link": None,
        "fixed": {name: middle("fixed", name) for name in each[0]["fixed"]},
    }


def compared(one: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """A check with what is predicted for it, and measured over predicted.

    By the rates of its own process, and the iterations that its conjugate gradient took.
    """
    job, found = Job(**one["job"]), one["measured"]
    expected = estimate(job, found.get("iterations"))
    rates = rates_of(found["rates"], results)
    predicted = {
        "seconds": seconds(job, expected, rates, waits=False),
        "memory": expected.memory,
    }
    if job.devices > 1:
        predicted["exchanged"] = expected.exchanged
    ratio = {key: found[key] / predicted[key] for key in predicted}
    return {"job": one["job"], "measured": found, "predicted": predicted, "ratio": ratio}


def measure() -> dict[str, Any]:
    """All checks, and typical rates."""
    import torch
    from growth_checks import measured, narrow_share

    torch.set_num_threads(1)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    results: dict[str, Any] = {"memory": memory, "link": LINK, "narrow": narrow_share()}
    results["checks"] = []
    for job in CHECKS:
        one = {"job": asdict(job), "measured": measured(job)}
        results["checks"].append(one)
        print(" ".join(row(compared(one, results))), flush=True)
    results["rates"] = typical([one["measured"]["rates"] for one in results["checks"]])
    return results


def row(one: dict[str, Any]) -> list[str]:
    """Of the table of checks."""
    job, cells = Job(**one["job"]), []
    for key, shown in (("seconds", time_of), ("memory", bytes_of)):
        cells += [shown(one["predicted"][key]), shown(one["measured"][key])]
        cells.append(f"{one['ratio'][key]:.2f}")
    return [job.method, f"{job.n:,}", f"{job.classes:,}", f"{job.d:,}", str(job.devices), *cells]


def rounded(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def time_of(value: float) -> str:
    """With a unit that suits it."""
    for unit, size in (("years", 3.156e7), ("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if value >= size:
            return f"{rounded(value / size)} {unit}"
    return f"{rounded(value * 1e3)} ms"


def bytes_of(value: float) -> str:
    """With a unit that suits it."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if value >= size:
            return f"{rounded(value / size)} {unit}"
    return f"{rounded(value / (1 << 20))} MiB"


def predicted(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every job of the table."""
    rates = rates_of(results["rates"], results, results["link"])
    found = []
    for job in jobs():
        one: Estimate = estimate(job)
        entry: dict[str, Any] = asdict(job)
        if one.refused:
            entry["refused"] = one.refused
        else:
            entry["seconds"] = float(f"{seconds(job, one, rates):.4g}")
            entry["memory"] = float(f"{one.memory:.4g}")
            entry["exchanged"] = one.exchanged if job.devices > 1 else 0
        found.append(entry)
    return found


def band(checks: list[dict[str, Any]], key: str, long: bool) -> tuple[float, float]:
    """The least and the largest ratio, of jobs that take SHORT seconds or more, or of all."""
    found = [c["ratio"][key] for c in checks if not long or c["measured"]["seconds"] >= SHORT]
    return min(found), max(found)


def render(results: dict[str, Any]) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    table = {(e["method"], e["n"], e["classes"], e["devices"]): e for e in results["predictions"]}

    def cell(method: str, n: int, classes: int) -> str:
        one, many = (table[method, n, classes, devices] for devices in (1, 64))
        if "refused" in one:
            return "refused"
        return (
            f"{time_of(one['seconds'])} / {time_of(many['seconds'])}, "
            f"{bytes_of(one['memory'])} / {bytes_of(many['memory'])}"
        )

    shown = {
        "time_of": time_of,
        "bytes_of": bytes_of,
        "billions": lambda value: rounded(value / 1e9),
        "row": row,
        "cell": cell,
        "band": band,
        "table": table,
        "heads": HEADS,
        "methods": METHODS,
        "short": SHORT,
        "long_count": sum(c["measured"]["seconds"] >= SHORT for c in results["checks"]),
        "compared": [compared(one, results) for one in results["checks"]],
        "iterations": ASSUMED_ITERATIONS,
        "taken": sorted(
            c["measured"]["iterations"] for c in results["checks"] if "iterations" in c["measured"]
        ),
        "most_classes": f"{math.isqrt(MAX_GATHERED // 8):,}",
        "epochs": EPOCHS,
        "batch": BATCH,
    }
    loader = FileSystemLoader(HERE)
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True}
    template = Environment(loader=loader, **options).get_template("growth.md.j2")
    return template.render(**results, **shown) + "\n"


def draw(path: Path, results: dict[str, Any]) -> None:
    """Time and memory against samples at one head; time against classes for 1,000 samples."""
    from imu_fast.study.report.demo_plots import new_figure, save

    colours = dict(zip(METHODS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    rates = rates_of(results["rates"], results, results["link"])
    figure = new_figure(figsize=(4, 8.6))
    panels = figure.subplots(3, 1)
    classes, d = 1_000, 2_048

    def value(job: Job, key: str) -> float | None:
        one = estimate(job)
        if one.refused:
            return None
        return seconds(job, one, rates) if key == "seconds" else one.memory / 2**30

    def points(key: str, fits: Any, along: str, method: str) -> list[tuple[float, float]]:
        found = []
        for one in results["checks"]:
            job = Job(**one["job"])
            if job.method == method and job.devices == 1 and fits(job):
                size = one["measured"][key]
                found.append((getattr(job, along), size if key == "seconds" else size / 2**30))
        return found

    for method, colour in colours.items():
        for axes, key in zip(panels, ("seconds", "memory"), strict=False):
            for devices, dash in ((1, "-"), (64, ":")):
                line = [value(Job(method, n, classes, d, devices), key) for n in SAMPLES]
                label = method if devices == 1 else None
                axes.plot(SAMPLES, line, dash, color=colour, label=label, linewidth=1.6)
            at = points(key, lambda job: job.classes == classes, "n", method)
            axes.plot([x for x, _ in at], [y for _, y in at], "o", color=colour, markersize=5)
        many = [round(10 ** (1 + k / 8)) for k in range(36)]
        line = [value(Job(method, 1_000, c, d), "seconds") for c in many]
        panels[2].plot(many, line, color=colour, linewidth=1.6)
        at = points("seconds", lambda job: (job.n, job.d) == (1_000, d), "classes", method)
        panels[2].plot([x for x, _ in at], [y for _, y in at], "o", color=colour, markersize=5)
    panels[1].axhline(results["memory"] / 2**30, color="#666666", linewidth=0.8)
    panels[1].annotate(
        "this machine", (1.2e3, 1.25 * results["memory"] / 2**30), size=7, color="#666666"
    )
    for axes, x, y in zip(
        panels,
        ("samples", "samples", "classes"),
        ("time", "resident memory per process", "time"),
        strict=True,
    ):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        low, high = axes.get_ylim()
        ticks = {k: v for k, v in (SIZES if axes is panels[1] else TIMES).items() if low < v < high}
        axes.set_yticks(list(ticks.values()), list(ticks))
        counted = {"10": 10, "100": 100, "1,000": 10**3, "10,000": 10**4, "100,000": 10**5}
        if axes is not panels[2]:
            counted = {"1,000": 10**3, "100,000": 10**5, "10 million": 10**7, "1 billion": 10**9}
        axes.set_xticks(list(counted.values()), list(counted))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    of_head = f"{classes:,} classes, {d:,} features"
    panels[0].set_title(f"{of_head}\nline: 1 process, dotted: 64, o: measured", size=9)
    panels[1].set_title(of_head, size=9)
    panels[2].set_title(f"1,000 samples, {d:,} features, 1 process", size=9)
    panels[0].legend(fontsize=8)
    save(figure, path)


def main(
    measured: Annotated[bool, typer.Option("--measure", help="Measure, and check.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of growth.json and growth.png.")] = RESULTS,
) -> None:
    """Print the table, and write results, figure and page."""
    from tabulate import tabulate

    path = out / "growth.json"
    if not measured and not path.is_file():
        raise typer.BadParameter(f"{path} is not there; pass --measure")
    out.mkdir(parents=True, exist_ok=True)
    results = measure() if measured else json.loads(path.read_text())
    results["predictions"] = predicted(results)
    lists = {key: results.pop(key) for key in ("checks", "predictions")}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in results.items()]
    for key, entries in lists.items():
        inner = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        lines.append(f'"{key}": [\n{inner}\n ]')
    results |= lists
    with replacing(path) as temporary:
        temporary.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    draw(out / "growth.png", results)
    if out == RESULTS:
        with replacing(PAGE) as temporary:
            temporary.write_text(render(results))
    names = ["", "n", "C", "d", "devices", "seconds", "memory", "exchanged"]
    shown = [
        [e["method"], f"{e['n']:.0e}", e["classes"], e["d"], e["devices"]]
        + (
            [e["refused"], "", ""]
            if "refused" in e
            else [time_of(e["seconds"]), bytes_of(e["memory"]), bytes_of(e["exchanged"])]
        )
        for e in results["predictions"]
    ]
    print(tabulate(shown, names, disable_numparse=True))
    names = ["", "n", "C", "d", "processes", *2 * ["predicted", "measured", "ratio"]]
    checked = [row(compared(one, results)) for one in results["checks"]]
    print(tabulate(checked, names, disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
