"""``imu-fast compare``: methods at matched depth over seeds and architectures, with statistics.

Models are trained (or read from the cache), learning rates chosen on a model and on images that the
report does not use, and every method run on every model and task, in processes side by side. Each
part is a file in the cache; an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import imu_fast
from imu_fast.evaluation.statistics import paired_tests, summary
from imu_fast.storage import replacing
from imu_fast.study.cache import Cache, fingerprint
from imu_fast.study.configuration import TUNING_SEED, Configuration
from imu_fast.study.data.tasks import Dataset, load_dataset, make_task
from imu_fast.study.entries import (
    AUTO,
    BASELINE,
    HEAD_BASELINE,
    HIGHLIGHT,
    ORIGINAL,
    RETRAINED,
    Entry,
    entries_named,
)
from imu_fast.study.runs import DEPTHS, METRICS, Reached, Setting
from imu_fast.unlearning.result import DivergedError

logger = logging.getLogger("imu_fast")

RULE = (
    "Learning rate: of a grid, the one with the best accuracy on validation images, the mean over "
    "the depths reached within a third of the step budget, on a model of its own (seed 100) that "
    "the report does not use; chosen once per architecture for a class and once for random sets. "
    "Where it diverges on a model of the report, the next smaller one."
)
_TESTED = ("retain_accuracy", "test_accuracy")
Json = dict[str, Any]


def _tuning_task(config: Configuration, kind: str) -> str | None:
    """The task that stands for its kind when learning rates are chosen: the middle one."""
    alike = [t for t in config.tasks if (t == "class") == (kind == "class")]
    return alike[len(alike) // 2] if alike else None


def _load(config: Configuration, seed: int) -> Dataset:
    path = None if config.data_path is None else Path(config.data_path)
    return load_dataset(config.data, path, config.train, seed)


def _write(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(workers: int) -> Executor:
    """Processes that share the cores among them; one is this one."""
    if workers == 1:
        return _Here()
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )


def train_original(cache: Cache, arch: str, seed: int) -> None:
    """Train one model into the cache."""
    cache.model(_load(cache.config, seed), arch, seed)


def choose_rates(cache: Cache, arch: str, kind: str) -> Json:
    """``{method: learning rate}`` for one kind of task; a method a file."""
    config = cache.config
    task = _tuning_task(config, kind)
    assert task is not None
    chosen: Json = {}
    prepared: list[Setting] = []

    def chosen_rate(entry: Entry) -> Any:
        if not prepared:
            data = _load(config, TUNING_SEED)
            model = cache.model(data, arch, TUNING_SEED)
            forget = make_task(task, data, TUNING_SEED)
            prepared.append(Setting(model, forget, None, TUNING_SEED))
        return prepared[0].choose_rate(entry, config.max_steps)

    for name, entry in entries_named(config.methods).items():
        if kind not in entry.kinds:
            continue
        if len(entry.rates) == 1:
            chosen[name] = entry.rates[0]
            continue
        extra = [dict(entry.options), entry.rates, "rate"]
        make = partial(chosen_rate, entry)
        chosen[name] = cache.run(arch, TUNING_SEED, task, name, extra, make)
    return chosen


def run_methods(cache: Cache, arch: str, seed: int, task: str, rates: Json) -> list[Json]:
    """Every method on one model and task; a method a file. Returns what the files hold."""
    config = cache.config
    found: list[Json] = []
    setting: Setting | None = None

    def prepared() -> Setting:
        nonlocal setting
        if setting is None:
            data = _load(config, seed)
            forget = make_task(task, data, seed)
            model = cache.model(data, arch, seed)
            retrained = cache.model(data, arch, seed, without=task, rest=forget.retain)
            setting = Setting(model, forget, retrained, seed)
        return setting

    def kept(name: str, extra: Any, make: Callable[[], Json]) -> None:
        value = cache.run(arch, seed, task, name, extra, make)
        found.append({"arch": arch, "seed": seed, "task": task, **value})

    def references() -> Json:
        s = prepared()
        assert s.retrained is not None
        pairs = ((ORIGINAL, s.original), (RETRAINED, s.retrained))
        rows = [{"method": name, "depth": "none", **s.measure(seen)} for name, seen in pairs]
        return {"n": len(s.task.forget[1]), "title": s.task.title, "rows": rows}

    def one_method(name: str, entry: Entry, mine: float | None) -> Json:
        return _rows(prepared(), name, entry, mine, config.max_steps)

    kept("references", None, references)
    kept("correlations", None, lambda: {"correlations": prepared().correlations()})
    kind = "class" if task == "class" else "random"
    for name, entry in entries_named(config.methods).items():
        if kind in entry.kinds:
            mine = rates[name]
            make = partial(one_method, name, entry, mine)
            kept(name, [dict(entry.options), mine], make)
    return found


def _rows(setting: Setting, name: str, entry: Entry, rate: float | None, max_steps: int) -> Json:
    """One method: a row per depth (without metrics, where it was not reached), and its way.

    Where it diverges the next smaller learning rate is taken, as anybody would who saw that.
    """
    found: dict[str, Reached] = {}
    way: list[tuple[float, float]] = []
    for smaller in [r for r in entry.rates if rate is not None and r <= rate]:
        rate = smaller
        try:
            found, way = setting.run(entry, rate, max_steps)
        except DivergedError as error:
            logger.info("%s: %s", name, error)
        else:
            break
    rows: list[Json] = []
    for depth in setting.milestones():
        row: Json = {"method": name, "depth": depth, "reached": depth in found, "lr": rate}
        if depth in found:
            reached = found[depth]
            row |= {"steps": reached.steps, "seconds": reached.seconds}
            row |= setting.measure(reached.seen)
        rows.append(row)
    return {"rows": rows, "trajectory": way}


def _all_done(futures: Iterable[Future[Any]], bar: tqdm) -> None:
    for future in as_completed(list(futures)):
        future.result()
        bar.update()


def run(config: Configuration, out: Path, *, progress: bool = True) -> tuple[Json, Json]:
    """Run a comparison, or what is missing of it.

    Args:
        out: folder of ``results.json`` and ``trajectories.json``; its ``cache`` keeps models and
            runs, and may be deleted.

    Returns:
        What these two files hold.

    Raises:
        InputError: unknown methods, data that are not there.
    """
    started = time.perf_counter()
    entries_named(config.methods)
    # Errors of the data belong before the work, and not into another process.
    seeds = [*range(config.seeds), TUNING_SEED]
    cache = Cache(out / "cache", config, {s: fingerprint(_load(config, s)) for s in seeds})
    kinds = [k for k in ("class", "random") if _tuning_task(config, k) is not None]
    models = [(arch, seed) for arch in config.archs for seed in range(config.seeds)]
    tuning = [(arch, TUNING_SEED) for arch in config.archs]
    jobs = [(*model, task) for task in config.tasks for model in models]
    pool = _pool(config.workers)
    total = len(models) + len(tuning) + len(config.archs) * len(kinds) + len(jobs)
    with tqdm(total=total, desc="compare", unit="part", disable=not progress) as bar:
        try:
            _all_done((pool.submit(train_original, cache, *m) for m in (*tuning, *models)), bar)
            choosing = {
                pool.submit(choose_rates, cache, arch, kind): (arch, kind)
                for arch in config.archs
                for kind in kinds
            }
            _all_done(choosing, bar)
            rates = {key: future.result() for future, key in choosing.items()}
            running = [
                pool.submit(
                    run_methods,
                    cache,
                    arch,
                    seed,
                    task,
                    rates[arch, "class" if task == "class" else "random"],
                )
                for arch, seed, task in jobs
            ]
            _all_done(running, bar)
            parts = [part for future in running for part in future.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    results, trajectories = _collect(config, parts)
    results["seconds"] = time.perf_counter() - started
    _write(out / "results.json", results)
    _write(out / "trajectories.json", trajectories)
    return results, trajectories


def _collect(config: Configuration, parts: list[Json]) -> tuple[Json, Json]:
    """Rows, their summary and tests, out of what the runs left."""
    rows: list[Json] = []
    trajectories: dict[str, dict[str, list[Any]]] = {task: {} for task in config.tasks}
    tasks: Json = {}
    for part in parts:
        where = {k: part[k] for k in ("arch", "seed", "task")}
        rows += [where | dict.fromkeys(METRICS) | row for row in part.get("rows", [])]
        if "trajectory" in part:
            method = part["rows"][0]["method"]
            trajectories[part["task"]].setdefault(method, []).append(part["trajectory"])
        if "title" in part:
            kind = "class" if part["task"] == "class" else "random"
            tasks[part["task"]] = {"title": part["title"], "kind": kind, "n": part["n"]}
    entries = entries_named(config.methods)
    table = summary(rows, METRICS)
    compared = [row for row in rows if row["depth"] != "none"]
    tests = [
        {"metric": metric, "baseline": baseline, **test}
        for metric in _TESTED
        for baseline in (BASELINE, HEAD_BASELINE)
        if baseline in entries
        for test in paired_tests(compared, metric, baseline)
    ]
    planned = [
        {"metric": "retain_accuracy", "baseline": baseline, **test}
        for baseline in (BASELINE, HEAD_BASELINE)
        if {baseline, AUTO} <= set(entries)
        for test in paired_tests(
            [row for row in compared if row["method"] in (baseline, AUTO)],
            "retain_accuracy",
            baseline,
            alternative="greater",
        )
    ]
    methods = {name: entry.describe() for name, entry in entries.items()}
    nothing = {"forget_only": False, "scope": "-", "batchnorm": "-", "weights": "-"}
    methods[ORIGINAL] = nothing | {"summary": "the model as it was trained"}
    methods[RETRAINED] = nothing | {"summary": "trained anew without the forget set"}
    return {
        "config": config.as_dict()
        | {"seeds": list(range(config.seeds)), "rule": RULE, "baseline": BASELINE}
        | {"highlight": list(HIGHLIGHT)},
        "versions": {
            "imu_fast": imu_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": os.cpu_count(),
        },
        "methods": methods,
        "tasks": {task: tasks[task] for task in config.tasks},
        "depths": {**DEPTHS, "none": "the model as trained, or trained without the forget set"},
        "rows": _plain(rows),
        "summary": _plain(table),
        "tests": _plain(tests),
        "planned": _plain(planned),
        "factorial": _plain(_factorial(table)),
        "correlations": _plain(_correlations(parts)),
    }, trajectories


def _plain(rows: list[Json]) -> list[Json]:
    """JSON has no NaN: what is missing is null."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]


def _factorial(table: list[Json]) -> list[Json]:
    """Parameters trained x BatchNorm mode x weights."""
    cells = []
    for line in table:
        corner = line["method"].split("/")
        if len(corner) == 3:
            cells.append(
                {"task": line["task"], "depth": line["depth"]}
                | dict(zip(("weights", "trained", "batchnorm"), corner, strict=True))
                | {"retain_mean": line["retain_accuracy_mean"]}
                | {"retain_std": line["retain_accuracy_std"], "n": line["retain_accuracy_n"]}
            )
    return cells


def _correlations(parts: list[Json]) -> list[Json]:
    values: dict[tuple[str, str, str], list[float]] = {}
    for part in parts:
        for name, value in part.get("correlations", {}).items():
            values.setdefault((part["task"], part["arch"], name), []).append(value)
    found = []
    for (task, arch, name), those in values.items():
        t = torch.tensor(those, dtype=torch.float64)
        spread = float(t.std()) if len(t) > 1 else math.nan
        keys = {"task": task, "arch": arch, "curvature": name}
        found.append(keys | {"spearman_mean": float(t.mean()), "spearman_std": spread})
    return found
