"""What a language experiment compares: methods as options of ``unlearn``, and planned questions."""

from __future__ import annotations

from typing import Any

import torch

from imu_fast.errors import check_choice
from imu_fast.study.entries import AUTO, ORIGINAL, TWIN, Entry
from imu_fast.study.results import Question
from imu_fast.unlearning.named import SUMMARIES

ALL = "all"
# Of SGD on cached features, and of AdamW on the whole network; largest first.
_HEAD_RATES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
_NETWORK_RATES = (1e-3, 3e-4, 1e-4)
_HEAD, _NETWORK = "head", "network"
# A batch whose scores are all positive is no reason to end a comparison.
_OPTIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "imu": {"on_empty": "uniform"},
    "permuted": {"on_empty": "uniform"},
    "npo": {},
    "simnpo": {},
}
# Methods that are given the kept data too: not what the others do with the forget set alone.
_WITH_KEPT = ("uniform", "simnpo")


def _entries() -> dict[str, Entry]:
    found = {}
    for place, scope, rates in ((_HEAD, "head", _HEAD_RATES), (_NETWORK, "all", _NETWORK_RATES)):
        for method, options in _OPTIONS.items():
            wanted = {"method": method, "scope": scope, **options}
            found[f"{method}, {place}"] = Entry(wanted, rates=rates)
    for method in _WITH_KEPT:
        wanted = {"method": method, "scope": "all", "retain_loss": "ce"}
        found[f"{method} + kept data, {_NETWORK}"] = Entry(wanted, rates=_NETWORK_RATES)
    # By the weights' size, and not by a model of their own: one rate, which is not passed on.
    found[AUTO] = Entry({"method": AUTO}, rates=(1.0,))
    found[f"{AUTO} + kept data"] = Entry({"method": AUTO, "retain_loss": "kl"}, rates=(1.0,))
    return found


ENTRIES = _entries()
HEAD_BASELINE, NETWORK_BASELINE = f"uniform, {_HEAD}", f"uniform, {_NETWORK}"

QUESTIONS = {
    "weights": Question(
        "What do the influence weights do, on the head?",
        HEAD_BASELINE,
        (f"imu, {_HEAD}", f"permuted, {_HEAD}"),
    ),
    "weights, network": Question(
        "The same where every parameter is trained.",
        NETWORK_BASELINE,
        (f"imu, {_NETWORK}", f"permuted, {_NETWORK}"),
    ),
    "weights, shuffled": Question(
        "Is it which sample a weight is of?", f"permuted, {_HEAD}", (f"imu, {_HEAD}",)
    ),
    "weights, shuffled, network": Question(
        "The same where every parameter is trained.", f"permuted, {_NETWORK}", (f"imu, {_NETWORK}",)
    ),
    "objective": Question(
        "What does a bounded objective do, where every parameter is trained?",
        NETWORK_BASELINE,
        (f"npo, {_NETWORK}", f"simnpo, {_NETWORK}"),
    ),
    "kept data": Question(
        "What do the kept data add, which the others do without?",
        NETWORK_BASELINE,
        tuple(f"{method} + kept data, {_NETWORK}" for method in _WITH_KEPT),
    ),
    "nothing": Question(
        "Is it nearer to retraining than doing nothing?", ORIGINAL, (*ENTRIES, TWIN)
    ),
}


def entries_named(names: tuple[str, ...]) -> dict[str, Entry]:
    """The entries of these names, in the table's order; ``"all"`` names every one.

    Raises:
        InputError: unknown name.
    """
    for name in names:
        check_choice("methods", name, (ALL, *ENTRIES))
    return {name: entry for name, entry in ENTRIES.items() if ALL in names or name in names}


def on_head(entry: Entry) -> bool:
    """Whether it changes the head alone, on cached features."""
    return bool(entry.options.get("scope") == "head")


def budget(entry: Entry, max_steps: int) -> int:
    """Steps of a run: three times as many on cached features, which cost next to nothing."""
    return 3 * max_steps if on_head(entry) else max_steps


def options_of(entry: Entry, kept: Any, **common: Any) -> dict[str, Any]:
    """Options of ``unlearn``: AdamW on a whole network, the kept data where they are asked for."""
    given = common | dict(entry.options)
    if entry.options["method"] == AUTO:  # its rate and its budget are its own
        given = {k: v for k, v in given.items() if k not in ("lr", "epochs", "max_steps")}
    elif not on_head(entry):
        given["optimizer"] = torch.optim.AdamW
    if "retain_loss" in given:
        given["retain"] = kept
    return given


def described(entries: dict[str, Entry]) -> dict[str, Any]:
    """For the results."""
    return {
        name: {
            "summary": SUMMARIES[entry.options["method"]],
            "forget_only": "retain_loss" not in entry.options,
            "options": dict(entry.options),
        }
        for name, entry in entries.items()
    }
