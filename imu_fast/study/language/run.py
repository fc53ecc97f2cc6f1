"""``imu-fast compare-language``: a language experiment over seeds, which goes on where it was.

Per seed: an original, two models that were retrained without the forget set (one is the reference,
the other a floor), and every method at the same depth. Learning rates are chosen on a seed that the
report does not use. What was measured is a file a seed in ``cells``; models are in ``cache``.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import imu_fast
from imu_fast.errors import InputError, check_count
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.evaluation.statistics import equivalence_tests, intervals, paired_tests, summary
from imu_fast.storage import replacing
from imu_fast.study.cache import weights_digest
from imu_fast.study.cells import Cell, Json, digest, rounded
from imu_fast.study.configuration import TUNING_SEED
from imu_fast.study.entries import ORIGINAL, RETRAINED, TWIN, Entry
from imu_fast.study.language.experiment import Experiment, Material, Measure
from imu_fast.study.language.methods import (
    ALL,
    QUESTIONS,
    budget,
    described,
    entries_named,
    options_of,
)
from imu_fast.study.language.models import ARCHITECTURE, stored
from imu_fast.study.language.report import markdown
from imu_fast.study.pool import all_done, process_pool
from imu_fast.unlearning.depth import StopRule
from imu_fast.unlearning.result import DivergedError
from imu_fast.unlearning.unlearn import unlearn

logger = logging.getLogger("imu_fast")

RULE = (
    "Learning rate: of a grid, the one with the least loss on validation rows of the kept kind at "
    "the depth, of those that reach it within a third of the step budget, on a model of its own "
    "(seed 100) that the report does not use. Where it diverges on a model of the report, the next "
    "smaller one."
)
DEPTH = "depth"
# Raised whenever what an older version made must not be taken over.
_VERSION = 1
# Other initial weights and another order than the original's.
_SEEDS = {ORIGINAL: 0, RETRAINED: 10_000, TWIN: 20_000}


@dataclass(frozen=True)
class Sitting:
    """One go at an experiment.

    Attributes:
        until: nothing is begun after this time (of ``time.time()``); None: no end.
    """

    experiment: Experiment
    methods: tuple[str, ...]
    folder: Path
    until: float | None = None

    @property
    def over(self) -> bool:
        return self.until is not None and time.time() > self.until

    @property
    def entries(self) -> dict[str, Entry]:
        return entries_named(self.methods)

    def cell(self, seed: int, material: Material) -> Cell:
        """Where what is measured of a seed's models is kept."""
        settings = self.experiment.settings()
        network = material.network.settings()
        key = digest([_VERSION, settings, network, material.fingerprint(), seed])[:12]
        name = f"{self.experiment.name}-{seed}-{key[:6]}.json"
        return Cell(self.folder / "cells" / name, key)


class Seed:
    """A seed's data, models and measurements; each is made when it is first needed."""

    def __init__(self, sitting: Sitting, seed: int) -> None:
        self.sitting, self.seed = sitting, seed
        self.experiment = sitting.experiment
        self.material = self.experiment.material(seed)
        self.cell = sitting.cell(seed, self.material)

    def _model(self, which: str) -> nn.Module:
        data = self.material.everything if which == ORIGINAL else self.material.kept
        network = self.material.network
        file = which.replace(", ", "-").split(" ")[0]
        name = f"{self.experiment.name}-{self.seed}-{file}-{self.cell.key[:6]}.safetensors"
        make = partial(network.trained, data, self.seed + _SEEDS[which])
        return stored(
            self.sitting.folder / "cache" / name, f"{self.cell.key} {which}", network, make
        )

    @cached_property
    def original(self) -> nn.Module:
        return self._model(ORIGINAL)

    @cached_property
    def retrained(self) -> nn.Module:
        """The reference.

        Raises:
            InputError: what the cell holds was measured on other models.
        """
        model = self._model(RETRAINED)
        known = self.cell.get("references", None)
        found = {ORIGINAL: weights_digest(self.original), RETRAINED: weights_digest(model)}
        if known is not None and any(known["weights"][name] != found[name] for name in found):
            raise InputError(
                f"path={str(self.cell.path)!r} was measured on other models than this machine "
                "trains; delete it, and it is measured anew, or bring the cache of its models"
            )
        return model

    @cached_property
    def stop(self) -> StopRule:
        return self.experiment.stop(lambda: self.retrained, self.material)

    @cached_property
    def measure(self) -> Measure:
        """Metrics of a model."""
        return self.experiment.measure(self.material, self.original, self.retrained, self.seed)

    def references(self) -> Json:
        """What is no method."""
        models = {ORIGINAL: self.original, RETRAINED: self.retrained, TWIN: self._model(TWIN)}
        rows = {name: self.measure(model) for name, model in models.items()}
        rows |= self.experiment.references(self.material, self.measure)
        return {
            "weights": {name: weights_digest(model) for name, model in models.items()},
            "stop": repr(self.stop),
            "rows": [{"method": name, "reached": True, **row} for name, row in rows.items()],
        }

    def run(self, entry: Entry, lr: float) -> tuple[nn.Module | None, Json]:
        """A model at the depth, or None if it was not reached; and what that took.

        Raises:
            DivergedError: the learning rate is too large.
        """
        steps = budget(entry, self.experiment.max_steps)
        size = self.experiment.batch_size
        model = copy.deepcopy(self.original)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a depth that is not reached is a row
            result = unlearn(
                model,
                self.material.forget.batches(),
                stop=self.stop,
                seed=self.seed,
                **options_of(
                    entry,
                    self.material.kept.batches(size),
                    lr=lr,
                    batch_size=size,
                    epochs=steps,  # each has a step at least
                    max_steps=steps,
                ),
            )
        row = {"lr": lr, "reached": bool(result.reached)}
        row |= {"steps": result.trajectory[-1]["step"], "seconds": result.seconds}
        return model if result.reached else None, row

    def rate(self, entry: Entry) -> Json:
        """The learning rate of an entry, by :data:`RULE`; None: none gets there."""
        best, chosen = float("inf"), None
        patience = budget(entry, self.experiment.max_steps) / 3
        for lr in entry.rates:
            try:
                model, row = self.run(entry, lr)
            except DivergedError:
                continue
            if model is None or row["steps"] > patience:
                if chosen is not None:
                    break  # smaller steps are slower still
                continue
            loss = evaluate(model, self.material.validation.batches())["loss"]
            if loss < best:
                best, chosen = loss, lr
        return {"lr": chosen}

    def row(self, entry: Entry, lr: float | None) -> Json:
        """A method's row: without metrics, where the depth was not reached."""
        found: Json = {"lr": lr, "reached": False}
        for smaller in [rate for rate in entry.rates if lr is not None and rate <= lr]:
            try:
                model, found = self.run(entry, smaller)
            except DivergedError as error:
                logger.info("%s: %s", dict(entry.options), error)
                continue
            return found if model is None else found | self.measure(model)
        return found


def _rate_depends(entry: Entry) -> Any:
    return [dict(entry.options), entry.rates]


def choose_rates(sitting: Sitting) -> None:
    """The learning rates of all methods, an entry each in the tuning seed's cell."""
    seed = Seed(sitting, TUNING_SEED)
    for name, entry in sitting.entries.items():
        if not sitting.over:
            seed.cell.made(name, _rate_depends(entry), partial(seed.rate, entry))


def run_seed(sitting: Sitting, number: int, rates: Mapping[str, Json]) -> None:
    """References and every method of a seed, an entry each in its cell."""
    seed = Seed(sitting, number)
    if not sitting.over:
        seed.cell.made("references", None, seed.references)
    for name, entry in sitting.entries.items():
        if name in rates and not sitting.over:
            lr = rates[name]["lr"]
            seed.cell.made(name, [dict(entry.options), lr], partial(seed.row, entry, lr))


def _known_rates(sitting: Sitting) -> dict[str, Json]:
    cell = sitting.cell(TUNING_SEED, sitting.experiment.material(TUNING_SEED))
    found = {n: cell.get(n, _rate_depends(entry)) for n, entry in sitting.entries.items()}
    return {name: rate for name, rate in found.items() if rate is not None}


def run(
    experiment: Experiment,
    out: Path,
    *,
    seeds: int = 5,
    methods: tuple[str, ...] = (ALL,),
    workers: int = 1,
    minutes: float | None = None,
    progress: bool = True,
) -> Json:
    """Run an experiment, or what is missing of it; writes ``results.json`` and ``table.md``.

    Args:
        out: folder of both, of ``cells``, what was measured, and of ``cache``, the models, which
            may be deleted.
        seeds: originals, from seed 0.
        methods: names of ``methods.ENTRIES``, or "all".
        workers: processes side by side, the cores shared among them.
        minutes: nothing is begun after that long; another call goes on.

    Returns:
        What is in ``results.json``.

    Raises:
        InputError: unknown methods, counts below 1, data that are not there, nothing measured yet.
    """
    check_count("seeds", seeds)
    check_count("workers", workers)
    if seeds > TUNING_SEED:
        raise InputError(f"seeds={seeds} reaches the seed that learning rates are chosen on")
    until = None if minutes is None else time.time() + 60 * minutes
    sitting = Sitting(experiment, methods, out, until)
    entries = entries_named(methods)
    pool = process_pool(workers)
    with tqdm(total=1 + seeds, desc=experiment.name, unit="part", disable=not progress) as bar:
        try:
            all_done([pool.submit(choose_rates, sitting)], bar)
            rates = _known_rates(sitting)
            all_done([pool.submit(run_seed, sitting, s, rates) for s in range(seeds)], bar)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    rows = []
    stops = []
    for number in range(seeds):
        cell = sitting.cell(number, experiment.material(number))
        found = {name: entry["value"] for name, entry in cell.read().items()}
        where = {"arch": ARCHITECTURE, "seed": number, "task": experiment.name, "depth": DEPTH}
        if references := found.get("references"):
            rows += [where | row for row in references["rows"]]
            stops.append(references["stop"])
        for name, entry in entries.items():
            rate = rates.get(name)
            if rate is None:
                continue
            if row := cell.get(name, [dict(entry.options), rate["lr"]]):
                rows.append(where | {"method": name} | row)
    results = _collected(experiment, entries, rows, stops)
    for name, text in (
        ("results.json", json.dumps(results, indent=1) + "\n"),
        ("table.md", markdown(results)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return results


def _collected(
    experiment: Experiment, entries: dict[str, Entry], rows: list[Json], stops: list[str]
) -> Json:
    """Rows, their summary, and the planned tests."""
    if not rows:
        raise InputError("nothing is measured yet; give the experiment more minutes")
    names = [metric.name for metric in experiment.metrics]
    wide = [dict.fromkeys(names) | row for row in rows]
    found = {
        "experiment": experiment.name,
        "title": experiment.title,
        "settings": experiment.settings(),
        "seeds": len({row["seed"] for row in rows}),
        "rule": RULE,
        "depth": experiment.depth,
        "stops": stops,
        "methods": described(entries),
        "metrics": [
            {"name": m.name, "label": m.label, "digits": m.digits, "meaning": m.meaning}
            for m in experiment.metrics
        ],
        "questions": {k: {"asks": q.asks, "baseline": q.baseline} for k, q in QUESTIONS.items()},
        "versions": {
            "imu_fast": imu_fast.__version__,
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        },
        "summary": summary(wide, [*names, "lr", "steps", "seconds"]),
        "intervals": [
            {"metric": name, **line}
            for name in experiment.margins
            for line in intervals(wide, name, cluster="seed")
        ],
        "tests": _tests(experiment, wide),
        "rows": rows,
    }
    return dict(rounded(found))


def _version(library: str) -> str:
    from importlib.metadata import version

    return version(library)


def _tests(experiment: Experiment, rows: list[Json]) -> list[Json]:
    """Each question's differences: tested for being there, and for being too small to matter."""
    found = []
    for name, question in QUESTIONS.items():
        wanted = (question.baseline, *question.methods)
        asked = [row for row in rows if row["method"] in wanted]
        there = {row["method"] for row in asked}
        if question.baseline not in there or len(there) < 2:
            continue
        for metric, margin in experiment.margins.items():
            differ = paired_tests(asked, metric, question.baseline, cluster="seed")
            alike = equivalence_tests(asked, metric, question.baseline, margin, cluster="seed")
            found += [
                {"question": name, "metric": metric, "margin": margin, **same, **line}
                for line, same in zip(differ, alike, strict=True)
                if line["n_pairs"]
            ]
    return found
