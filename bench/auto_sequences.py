"""How ``auto`` forgets sequences was chosen: ``python bench/auto_sequences.py FOLDER --tofu FILE``.

On the models of seed 100 of ``imu-fast compare-language``, which its report does not use: recipes
for the whole network by AdamW, with and without the data that stay, beside doing nothing and
another retrained model, all at that experiment's depth. Then what was chosen, ``auto``, on models
of other seeds. FOLDER keeps the models and what was measured; the same command goes on. FILE:
TOFU's questions, as of ``compare-language``.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tabulate import tabulate

import imu_fast as imu
from imu_fast.evaluation.statistics import t_interval
from imu_fast.storage import replacing
from imu_fast.study.cells import rounded
from imu_fast.study.configuration import TUNING_SEED
from imu_fast.study.entries import AUTO, ORIGINAL, TWIN, Entry
from imu_fast.study.language.methods import ENTRIES
from imu_fast.study.language.named import experiment_named
from imu_fast.study.language.run import Seed, Sitting

# (method, learning rate, what is done for the data that stay, its weight)
ALONE = [
    (method, lr, None, None)
    for method in ("uniform", "simnpo")
    for lr in (3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
]
KEPT: list[tuple[str, float, str | None, float | None]] = [
    ("uniform", 1e-3, "ce", 1.0),
    ("uniform", 3e-4, "ce", 1.0),
    ("uniform", 1e-3, "ce", 5.0),
    ("uniform", 3e-4, "ce", 5.0),
    ("uniform", 3e-4, "kl", 1.0),
    ("uniform", 1e-4, "kl", 5.0),
    ("uniform", 1e-3, "kl", 5.0),
    ("uniform", 3e-4, "kl", 5.0),
    ("uniform", 1e-3, "kl", 10.0),
    ("uniform", 1e-3, "kl", 20.0),
    ("npo", 1e-3, "ce", 5.0),
    ("simnpo", 1e-3, "ce", 1.0),
    ("random_label", 3e-4, "ce", 5.0),
]
CHOSEN = (AUTO, f"{AUTO} + kept data")
SHOWN = {
    "markov": ("kl_retrained", "kl_retrained_forget", "kl_retrained_kept"),
    "tofu": ("gap", "kl_forget", "kl_kept", "kept_probability"),
}
# As docs/language-study.md has them.
NAMES = {
    "kl_retrained": "KL to retrained",
    "kl_retrained_forget": "on forgotten",
    "kl_retrained_kept": "on kept",
    "gap": "gap",
    "kl_forget": "KL, forget",
    "kl_kept": "KL, kept",
    "kept_probability": "p, kept",
}


def row(seed: Seed, method: str, lr: float, loss: str | None, weight: float | None) -> Any:
    options: dict[str, Any] = {"method": method, "scope": "all"}
    if loss is not None:
        options |= {"retain_loss": loss, "retain_weight": weight}
    return seed.row(Entry(options, rates=(lr,)), lr)


def references(seed: Seed) -> list[dict[str, Any]]:
    return list(seed.cell.made("references", None, seed.references)["rows"])


def developed(name: str, folder: Path, tofu: Path | None) -> list[dict[str, Any]]:
    """The candidates, on the development models."""
    seed = Seed(Sitting(experiment_named(name, tofu), (), folder), TUNING_SEED)
    rows = references(seed)
    for method, lr, loss, weight in [*ALONE, *KEPT]:
        kept = "" if loss is None else f" + {weight:g} x {loss} of kept data"
        label = f"{method}{kept}, lr {lr:g}"
        found = seed.cell.made(label, [], partial(row, seed, method, lr, loss, weight))
        rows.append({"method": label, **found})
        print(name, rows[-1], flush=True)
    return rows


def reported(name: str, folder: Path, tofu: Path | None, number: int) -> list[dict[str, Any]]:
    """What was chosen, on the models of a seed that had no part in it."""
    seed = Seed(Sitting(experiment_named(name, tofu), (), folder), number)
    rows = references(seed)
    for label in CHOSEN:
        entry = ENTRIES[label]
        found = seed.cell.made(label, dict(entry.options), partial(seed.row, entry, 1.0))
        rows.append({"method": label, **found})
        print(name, number, rows[-1], flush=True)
    return [{"seed": number, **found} for found in rows]


def page(results: dict[str, Any], name: str) -> str:
    """Of the report's seeds: mean and deviation, and what differs from doing nothing, at 95 %."""
    rows, keys = results[name]["seeds"], SHOWN[name]
    by = {(r["method"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    table = []
    for method in (ORIGINAL, TWIN, *CHOSEN):
        line: list[Any] = [method]
        for key in keys:
            own = np.array([by[method, seed][key] for seed in seeds])
            cell = f"{own.mean():.3f} ± {own.std(ddof=1):.3f}"
            if method in CHOSEN:
                less = own - np.array([by[ORIGINAL, seed][key] for seed in seeds])
                low, high = t_interval(less)
                cell += f" ({less.mean():+.3f}, {low:+.3f} to {high:+.3f})"
            line.append(cell)
        table.append(line)
    return tabulate(table, headers=("method", *map(NAMES.get, keys)), tablefmt="github")


def development(results: dict[str, Any]) -> str:
    """Of the candidates that came to the depth on both, what the choice is made by."""
    both = [{r["method"]: r for r in results[name]["development"]} for name in SHOWN]
    table = []
    for method in both[1]:
        chains, questions = (found.get(method, {}) for found in both)
        if not (chains.get("reached") and questions.get("reached")) or "retrained" == method:
            continue
        shown = [chains["kl_retrained"], *(questions[key] for key in SHOWN["tofu"][:3])]
        table.append([method, *(f"{value:.3f}" for value in shown)])
    headers = ("method", "chains: KL", "questions: gap", "KL, forget", "KL, kept")
    return tabulate(table, headers=headers, tablefmt="github", disable_numparse=True)


def main(
    folder: Path,
    tofu: Annotated[
        Path | None, typer.Option(help="TOFU's questions; without: chains alone.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Models to report on.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the rows go.")] = Path(
        "bench/results/auto_sequences.json"
    ),
) -> None:
    """Compare recipes of sequences on the development models."""
    torch.set_num_threads(1)
    names = {"markov": None} if tofu is None else {"markov": None, "tofu": tofu}
    found: dict[str, Any] = {}
    for name, path in names.items():
        rows = developed(name, folder, path)
        others = [r for number in range(seeds) for r in reported(name, folder, path, number)]
        found[name] = {"development": rows, "seeds": others}
    versions = {"imu_fast": imu.__version__, "torch": torch.__version__}
    with replacing(out) as path:
        path.write_text(json.dumps(rounded({"versions": versions, **found}), indent=1) + "\n")
    for name, both in found.items():
        keys = ("method", "reached", "steps", *SHOWN[name])
        rows = [[r.get(k) for k in keys] for r in both["development"]]
        print(tabulate(rows, headers=keys, floatfmt=".3g"))
        if seeds > 1:
            print(page(found, name))


if __name__ == "__main__":
    typer.run(main)
