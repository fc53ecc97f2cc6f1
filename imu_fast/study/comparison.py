"""``imu-fast compare``: methods at matched depth over seeds and architectures, against retraining.

Models are trained (or read from the cache), learning rates chosen on a model and on images that the
report does not use, and every method run on every model and task, in processes side by side, cheap
methods first. What was measured is a file per model and task; an interrupted comparison, or one
whose time was up, goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from imu_fast.errors import InputError, check_positive
from imu_fast.study.cache import Cache, Contents, known_images, weights_digest
from imu_fast.study.cells import Json, digest, pack
from imu_fast.study.configuration import SEEDS, TUNING_SEED, Configuration
from imu_fast.study.data.tasks import (
    Dataset,
    ForgetTask,
    check_measurable,
    kind_of,
    load_dataset,
    make_task,
)
from imu_fast.study.entries import FLIPS, ORIGINAL, RETRAINED, TWIN, Entry, entries_named
from imu_fast.study.pool import all_done, process_pool
from imu_fast.study.results import collect, write_results
from imu_fast.study.runs import KINDS, Reached, Setting, Shadow
from imu_fast.unlearning.result import DivergedError

logger = logging.getLogger("imu_fast")

# Methods on the cached features of the head, then those that run the network at every step.
_TIERS = ("head", "network")


def _tier_of(entry: Entry) -> str:
    return "head" if entry.scope == "head" else "network"


def _tuning_task(config: Configuration, kind: str) -> str | None:
    """The task that stands for its kind when learning rates are chosen: the middle one."""
    alike = [t for t in config.tasks if kind_of(t) == kind]
    return alike[len(alike) // 2] if alike else None


def _load(config: Configuration, seed: int) -> Dataset:
    path = None if config.data_path is None else Path(config.data_path)
    return load_dataset(config.data, path, config.train, seed)


def _contents(config: Configuration, seed: int) -> Contents:
    """What a seed's data are, which have what each task needs.

    Raises:
        InputError: a task cannot be measured on them.
    """
    data = _load(config, seed)
    for task in config.tasks:
        check_measurable(make_task(task, data, seed))
    return Contents.of(data)


@dataclass(frozen=True)
class Sitting:
    """One go at a comparison.

    Attributes:
        until: no model and no run is begun after this time (of ``time.time()``); None: no end.
    """

    cache: Cache
    until: float | None = None

    @property
    def over(self) -> bool:
        return self.until is not None and time.time() > self.until


def train_original(sitting: Sitting, arch: str, seed: int) -> None:
    """Train one model into the cache."""
    if not sitting.over:
        sitting.cache.model(_load(sitting.cache.config, seed), arch, seed)


def choose_rates(sitting: Sitting, arch: str, kind: str, tier: str) -> None:
    """The learning rates of one kind of task and tier of methods, an entry each."""
    config = sitting.cache.config
    task = _tuning_task(config, kind)
    assert task is not None
    prepared: list[Setting] = []

    def chosen_rate(entry: Entry) -> Json:
        if not prepared:
            data = _load(config, TUNING_SEED)
            model = sitting.cache.model(data, arch, TUNING_SEED)
            prepared.append(Setting(model, make_task(task, data, TUNING_SEED), None, TUNING_SEED))
        return {"lr": prepared[0].choose_rate(entry, config.max_steps)}

    for name, entry in _entries(config, kind, tier).items():
        if len(entry.rates) > 1 and not sitting.over:
            cell = sitting.cache.cell(arch, TUNING_SEED, task)
            cell.made(name, _rate_depends(config, entry), partial(chosen_rate, entry))


def _rate_depends(config: Configuration, entry: Entry) -> Any:
    return [dict(entry.options), entry.rates, config.max_steps]


def _rate(cache: Cache, arch: str, task: str, name: str, entry: Entry) -> Json | None:
    """What :func:`choose_rates` found, or None if it has not come to that."""
    if len(entry.rates) == 1:
        return {"lr": entry.rates[0]}
    tuning = _tuning_task(cache.config, kind_of(task))
    assert tuning is not None
    cell = cache.cell(arch, TUNING_SEED, tuning)
    found: Json | None = cell.get(name, _rate_depends(cache.config, entry))
    return found


def _entries(config: Configuration, kind: str, tier: str) -> dict[str, Entry]:
    return {
        name: entry
        for name, entry in entries_named(config.methods).items()
        if kind in entry.kinds and _tier_of(entry) == tier
    }


class _Prepared:
    """A model, its task and all that it is compared with, made when first needed."""

    def __init__(self, cache: Cache, arch: str, seed: int, task: str) -> None:
        self.cache, self.arch, self.seed, self.task = cache, arch, seed, task
        self._setting: Setting | None = None

    def __call__(self) -> Setting:
        if self._setting is None:
            cache, arch, seed = self.cache, self.arch, self.seed
            data = _load(cache.config, seed)
            forget = make_task(self.task, data, seed)
            retrained, twin = (
                cache.model(data, arch, seed, without=self.task, rest=forget.retain, twin=which)
                for which in (False, True)
            )
            model = cache.model(data, arch, seed)
            self._check_same({"original": model, "retrained": retrained, "twin": twin})
            shadows = [*self._shadows(data, forget)]
            self._setting = Setting(model, forget, retrained, seed, twin=twin, shadows=shadows)
        return self._setting

    def _check_same(self, models: dict[str, nn.Module]) -> None:
        """What is in the cell already was measured on these very models.

        Raises:
            InputError: on others: another machine trains other weights from the same seed.
        """
        weights = {name: weights_digest(model) for name, model in models.items()}
        self.identity = {"weights": weights}
        cell = self.cache.cell(self.arch, self.seed, self.task)
        known = cell.read().get("references")
        if known is not None and known["value"]["weights"] != weights:
            raise InputError(
                f"path={str(cell.path)!r} was measured on other models than this machine trains; "
                "delete it, and it is measured anew, or bring the cache of its models"
            )

    def _shadows(self, data: Dataset, forget: ForgetTask) -> Iterable[Shadow]:
        """Other seeds' originals: each was trained on images of its own.

        As many for every seed, and none of those beyond the usual number of seeds: what is in a
        cell is not to change with how many seeds a comparison has.
        """
        mine = known_images(forget.forget[0])
        others = [*range(min(self.cache.config.seeds, SEEDS)), TUNING_SEED]
        for seed in [s for s in others if s != self.seed][:SEEDS]:
            without = ~torch.isin(mine, self.cache.contents[seed].trained_on)
            if bool(without.any()):
                # In the cache since the comparison's first stage, so its data are not needed.
                yield Shadow(self.cache.model(data, self.arch, seed), without)


def run_cell(sitting: Sitting, arch: str, seed: int, task: str, tier: str) -> None:
    """Every method of a tier on one model and task, an entry each in the cell's file."""
    cache = sitting.cache
    config, cell = cache.config, cache.cell(arch, seed, task)
    prepared = _Prepared(cache, arch, seed, task)
    if not sitting.over:
        cell.made(
            "references",
            _references_depend(config),
            lambda: _references(prepared()) | prepared.identity,
        )
    if not sitting.over:
        cell.made("correlations", None, lambda: prepared().correlations())
    for name, entry in _entries(config, kind_of(task), tier).items():
        found = _rate(cache, arch, task, name, entry)
        if found is not None and not sitting.over:
            make = partial(_rows, prepared, entry, found["lr"], config.max_steps)
            cell.made(name, _depends(config, entry, found), make)


def _depends(config: Configuration, entry: Entry, rate: Json) -> Any:
    return [dict(entry.options), rate["lr"], config.max_steps, *_few_seeds(config)]


def _few_seeds(config: Configuration) -> list[int]:
    """How many models the likelihood-ratio attack rests on, where they are not the usual ones."""
    return [config.seeds] if config.seeds < SEEDS else []


def _references_depend(config: Configuration) -> Any:
    return _few_seeds(config) or None


def _references(setting: Setting) -> Json:
    """What is no method: measured once, the same at every depth but for random flips."""
    assert setting.retrained is not None and setting.twin is not None
    seen = {ORIGINAL: setting.original, RETRAINED: setting.retrained, TWIN: setting.twin}
    rows = [
        {"method": name, "depth": depth, "reached": True, **setting.measure(model)}
        for name, model in seen.items()
        for depth in KINDS[setting.task.kind][:1]
    ]
    flips = [
        {"method": FLIPS, "depth": depth, "reached": True} | setting.measure(setting.flipped(depth))
        for depth in KINDS[setting.task.kind]
    ]
    return {
        "n": len(setting.task.forget[1]),
        "title": setting.task.title,
        "unseen_accuracy": setting.unseen_accuracy,
        "rows": pack([*rows, *flips]),
    }


def _rows(
    prepared: Callable[[], Setting], entry: Entry, rate: float | None, max_steps: int
) -> Json:
    """One method: a row per depth (without metrics, where it was not reached), and its way.

    Where it diverges the next smaller learning rate is taken, as anybody would who saw that.
    """
    setting = prepared()
    found: dict[str, Reached] = {}
    way: list[tuple[float, float]] = []
    for smaller in [r for r in entry.rates if rate is not None and r <= rate]:
        rate = smaller
        try:
            found, way = setting.run(entry, rate, max_steps)
        except DivergedError as error:
            logger.info("%s: %s", entry.options, error)
        else:
            break
    rows: list[Json] = []
    for depth in setting.milestones():
        row: Json = {"depth": depth, "reached": depth in found, "lr": rate}
        if depth in found:
            reached = found[depth]
            row |= {"steps": reached.steps, "seconds": reached.seconds}
            row |= setting.measure(reached.seen)
        rows.append(row)
    return {"rows": pack(rows), "way": way}


def run(
    config: Configuration, out: Path, *, minutes: float | None = None, progress: bool = True
) -> Json:
    """Run a comparison, or what is missing of it.

    Args:
        out: folder of ``results.json``, and of ``cells``, what was measured; its ``cache`` keeps
            models, and may be deleted.
        minutes: no model and no run is begun after that long; another call goes on.

    Returns:
        What :func:`imu_fast.study.results.read_results` reads from there.

    Raises:
        InputError: unknown methods, data that are not there.
    """
    until = None
    if minutes is not None:
        until = time.time() + 60 * check_positive("minutes", minutes, allow_zero=True)
    entries_named(config.methods)
    # Errors of the data belong before the work, and not into another process.
    contents = {seed: _contents(config, seed) for seed in (*range(config.seeds), TUNING_SEED)}
    cache = Cache(out / "cache", config, contents)
    sitting = Sitting(cache, until)
    kinds = [k for k in KINDS if _tuning_task(config, k) is not None]
    models = [(arch, seed) for seed in (TUNING_SEED, *range(config.seeds)) for arch in config.archs]
    cells = [
        (arch, seed, task)
        for seed in range(config.seeds)
        for task in config.tasks
        for arch in config.archs
    ]
    # Of an architecture whose cells are whole no model is needed.
    open_archs = {arch for arch, seed, task in cells if not _whole(cache, arch, seed, task)}
    stages: list[list[tuple[Any, ...]]] = [
        [(train_original, *model) for model in models if model[0] in open_archs]
    ]
    for tier in _TIERS:
        stages.append([(choose_rates, arch, k, tier) for k in kinds for arch in config.archs])
        stages.append([(run_cell, *cell, tier) for cell in cells])
    pool = process_pool(config.workers)
    total = sum(len(stage) for stage in stages)
    with tqdm(total=total, desc="compare", unit="part", disable=not progress) as bar:
        try:
            for stage in stages:
                all_done([pool.submit(job[0], sitting, *job[1:]) for job in stage], bar)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    found: list[tuple[Json, Json]] = []
    files: Json = {}
    for arch, seed, task in cells:
        if entries := _finished(cache, arch, seed, task):
            where: Json = {"arch": arch, "seed": seed, "task": task}
            cell = cache.cell(arch, seed, task)
            files[cell.path.name] = {"key": cell.key, **where, "entries": digest(entries)[:12]}
            found.append((where, entries))
    results = collect(config, found)
    write_results(results, files, out)
    return results


def _whole(cache: Cache, arch: str, seed: int, task: str) -> bool:
    """Whether every entry of a cell is there."""
    kind = kind_of(task)
    wanted = {name for tier in _TIERS for name in _entries(cache.config, kind, tier)}
    return wanted | {"references", "correlations"} <= set(_finished(cache, arch, seed, task))


def _finished(cache: Cache, arch: str, seed: int, task: str) -> Json:
    """What a cell holds of this comparison's entries."""
    config, cell = cache.config, cache.cell(arch, seed, task)
    found = {"references": cell.get("references", _references_depend(config))}
    found["correlations"] = cell.get("correlations", None)
    for tier in _TIERS:
        for name, entry in _entries(config, kind_of(task), tier).items():
            rate = _rate(cache, arch, task, name, entry)
            if rate is not None:
                found[name] = cell.get(name, _depends(config, entry, rate))
    return {name: value for name, value in found.items() if value is not None}
