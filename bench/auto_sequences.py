"""How ``auto`` forgets sequences was chosen: ``python bench/auto_sequences.py FOLDER --tofu FILE``.

On the models of seed 100 of ``imu-fast compare-language``, which its report does not use: recipes
for the whole network by AdamW, with and without the data that stay, beside doing nothing and
another retrained model, all at that experiment's depth. Then what was chosen, ``auto``, on models
of other seeds. FOLDER keeps the models and what was measured; the same command goes on. FILE:
TOFU's questions, as of ``compare-language``.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate

import imu_fast as imu
from imu_fast.storage import replacing
from imu_fast.study.cells import rounded
from imu_fast.study.configuration import TUNING_SEED
from imu_fast.study.entries import AUTO, Entry
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


def means(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[list[Any]]:
    """By method: how many seeds came to the depth, and ``mean +- deviation`` of each metric."""
    table = []
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method and r["reached"]]
        line: list[Any] = [method, len(own)]
        for key in keys:
            values = [r[key] for r in own if r.get(key) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line.append(f"{statistics.mean(values):.3f} ± {spread:.3f}" if values else "-")
        table.append(line)
    return table


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
        print(
            tabulate(means(both["seeds"], SHOWN[name]), headers=("method", "seeds", *SHOWN[name]))
        )


if __name__ == "__main__":
    typer.run(main)
