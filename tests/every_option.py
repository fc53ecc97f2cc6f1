"""Every method of unlearning with every option of every other: ``python tests/every_option.py``.

An option is *used* if the outcome is another than without it, or *refused* by an InputError that
names it. One that does neither is *ignored*, which is a fault: exit code 1.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import ImuFastError
from imu_fast.unlearning.named import METHODS, MethodOptions

RETAINED = (torch.linspace(-1, 1, 120, dtype=torch.float64).view(20, 6), torch.arange(20) % 4)
# Values that are to show: the first that changes the outcome is enough.
VALUES: dict[str, list] = {
    "task": ["samples", "class"],
    "unseen": [0.5],
    "weights": ["loss", "uniform"],
    "curvature": ["identity", "ggn"],
    "damping": [1.0],
    "damping_mode": ["clamp", "relative"],
    "fisher": ["empirical"],
    "solver": ["cg", "dual"],
    "tolerance": [0.5],
    "preconditioner": ["nystrom", "none"],
    "top_fraction": [0.3],
    "clip_quantile": [0.4],
    "quantile_over": ["all"],
    "on_empty": ["uniform"],
    "first_row_is_mean": [True],
    "reweight": ["epoch"],
    "objective": ["margin", "ce"],
    "target": ["nearest", "random"],
    "scope": ["all"],
    "layers": ["fc1"],
    "layer": ["fc1"],
    "rows": ["forgotten", "all"],
    "precondition": ["features", "kfac", torch.eye(13, dtype=torch.float64)],
    "precondition_eps": [1.0],
    "eps": [1.0],
    "moment": [torch.eye(13, dtype=torch.float64)],
    "batchnorm": ["train"],
    "dropout": ["train"],
    "scored": ["trained"],
    "optimizer": [torch.optim.Adam],
    "lr": [0.3],
    "momentum": [0.0],
    "weight_decay": [0.1],
    "epochs": [3, 1],
    "max_steps": [1],
    "batch_size": [7],
    "alpha": [0.01],
    "record": ["step"],
    "preset": ["paper"],
    "margin": [0.7],
    "metric": ["ggn"],
    "k": [0.5],
    "calibrated": [True],
    "targets": [torch.linspace(-1, 1, 120, dtype=torch.float64).view(30, 4).softmax(1)],
    "then": ["margin_edit"],
    "summary": [],  # of the problems' model: see problems()
    "beta": [0.3],
    "gamma": [0.5],
    "answer": [[1, 2]],
    "retain": [RETAINED],
    "retain_loss": ["kl"],
    "retain_weight": [3.0],
}
# Choices that have an option which the method's own do not.
COMPANY: dict[str, dict] = {
    option: company
    for options, company in (
        (("solver", "tolerance"), {"curvature": "ggn", "solver": "cg"}),
        (("preconditioner",), {"curvature": "ggn", "solver": "cg", "damping": 1e-6}),
        (("fisher",), {"curvature": "kfac"}),
        (("precondition_eps", "eps"), {"precondition": "features"}),
        (("batchnorm", "dropout"), {"scope": "all"}),
        (("scored",), {"weights": "influence", "scope": "layers", "layers": ["fc1"]}),
        (("layers",), {"scope": "layers"}),
        (("target",), {"objective": "relabel"}),
        (("beta", "gamma"), {"objective": "simnpo"}),
        (("answer",), {"objective": "refusal"}),
        (("retain_loss", "retain_weight"), {"retain": RETAINED}),
        (("curvature", "damping", "damping_mode", "on_empty"), {"weights": "influence"}),
        (("top_fraction", "clip_quantile", "quantile_over"), {"weights": "influence"}),
        (("first_row_is_mean", "reweight"), {"weights": "influence"}),
    )
    for option in options
}
# Options that name what is so anyway where nothing else is chosen.
SAME = {
    "scored": "the same by definition (the head is what is trained)",
    "layers": "the same by definition (that is the head)",
    "layer": "the same by definition (that is the head)",
}


HALF = imu.StopRule(forget_accuracy=0.5)


class Network(nn.Module):
    """A network with all that options speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(self.drop(self.norm(x)))))


@dataclass(frozen=True)
class Problem:
    """A model and a forget set."""

    model: nn.Module
    data: tuple[torch.Tensor, torch.Tensor]


def with_depth(method: typing.Any, task: str, options: dict) -> dict:
    """``auto`` asks for a depth where samples are not a class, and a removal without a summary."""
    named = {"stop", "milestones", "unseen"} & options.keys()
    if method in ("self_distillation", METHODS["self_distillation"]) and not named:
        return {"stop": HALF, **options}
    if method in ("newton_removal", METHODS["newton_removal"]) and not named:
        return options if options.get("summary") else {"stop": HALF, **options}
    if method not in ("auto", METHODS["auto"]) or task == "a class" or named:
        return options
    return {"stop": imu.StopRule(forget_accuracy=0.0), **options}


def problems() -> dict[str, Problem]:
    """A class, random samples, and a set of which no sample supports forgetting."""
    torch.manual_seed(0)
    model, y = Network().double(), torch.arange(80) % 4
    x = 2 * torch.randn(4, 6, dtype=torch.float64)[y] + torch.randn(80, 6, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        summary = imu.save_summary(model, (x, y), Path(folder) / "s", weight_decay=0.01, unseen=0.6)
    VALUES["summary"] = [summary]
    sure = copy.deepcopy(model)
    with torch.no_grad():  # losses, and so gradients, of exactly zero
        sure.fc2.bias[2] = 1e6
    rows = torch.randperm(80)[:30]
    return {
        "a class": Problem(model.eval(), (x[y == 2], y[y == 2])),
        "random": Problem(model.eval(), (x[rows], y[rows])),
        "none negative": Problem(sure.eval(), (x[y == 2], y[y == 2])),
    }


def outcome(problem: Problem, method: str, **options: typing.Any) -> str:
    """All that a run leaves, to the last bit; or its error."""
    model = copy.deepcopy(problem.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = with_depth(method, "any", options)
            result = imu.unlearn(model, problem.data, method=method, **options)
    except ImuFastError as error:
        return f"{type(error).__name__}: {error}"
    state = {k: v.tolist() for k, v in model.state_dict().items()}
    chosen = (result.indices.tolist(), result.weights.tolist())
    scores = None if result.scores is None else result.scores.tolist()
    return repr((state, chosen, scores, result.trajectory, result.batch_losses, result.stopped_by))


def refused(said: str, option: str) -> bool:
    return said.startswith("InputError") and f"no option {option}" in said


Outcome = Callable[..., str]


def remembered() -> Outcome:
    """:func:`outcome`, each once."""
    known: dict[typing.Any, str] = {}

    def once(problem: Problem, method: str, **company: typing.Any) -> str:
        key = (id(problem), method, repr(sorted(company.items())))
        if key not in known:
            known[key] = outcome(problem, method, **company)
        return known[key]

    return once


def verdict(
    sets: dict[str, Problem], method: str, option: str, without: Outcome | None = None
) -> str:
    """``used``, ``used with ...``, ``refused`` or ``IGNORED``; without: what is without it."""
    without = without or outcome
    first = ""
    for company in ({}, COMPANY.get(option, {})):
        for problem, value in itertools.product(sets.values(), VALUES[option]):
            if option in company and company is not COMPANY.get(option):
                continue
            bare = without(problem, method, **company)
            if any(f"no option {name}" in bare for name in company):
                continue
            said = outcome(problem, method, **{**company, option: value})
            if refused(said, option):
                first = first or "refused"
            elif said != bare:
                extra = ", ".join(f"{k}={v!r}" for k, v in company.items())
                return f"used with {extra}" if company else "used"
            elif (reason := SAME.get(option)) and not company:
                first = first or reason
            else:
                first = "IGNORED"
        if first == "IGNORED":
            return first
    return first


def run_arguments(sets: dict[str, Problem], method: str) -> dict[str, str]:
    """The same of the arguments that are no options of a method."""
    problem, calls, records = sets["random"], [], []
    rule = imu.StopRule(forget_accuracy=1.0)
    bare = outcome(problem, method)
    said = {
        "stop": outcome(problem, method, stop=rule),
        "milestones": outcome(problem, method, milestones={"a": rule}),
        "watch": outcome(problem, method, watch={"a": problem.data}),
    }
    found = {name: "used" if text != bare else "IGNORED" for name, text in said.items()}
    outcome(problem, method, milestones={"a": rule}, on_milestone=lambda *a: calls.append(a))
    outcome(problem, method, callback=records.append)
    found["on_milestone"] = "used" if calls else "IGNORED"
    found["callback"] = "used" if records else "IGNORED"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        text = outcome(problem, method, checkpoint=path)
        found["checkpoint"] = "used" if path.exists() else "IGNORED"
        if text.startswith("InputError") and "checkpoint=" in text:
            found["checkpoint"] = "refused"
    return found


def verdicts_of(sets: dict[str, Problem], method: str) -> dict[str, str]:
    """Option -> verdict."""
    known = sorted(typing.get_type_hints(MethodOptions))
    assert set(known) == set(VALUES), set(known) ^ set(VALUES)
    without = remembered()
    found = {option: verdict(sets, method, option, without) for option in known}
    return found | run_arguments(sets, method)


def table() -> dict[str, dict[str, str]]:
    """Method -> option -> verdict."""
    sets = problems()
    return {method: verdicts_of(sets, method) for method in METHODS}


def main() -> int:
    rows, ignored = table(), []
    for method, verdicts in rows.items():
        groups: dict[str, list[str]] = {}
        for option, said in verdicts.items():
            groups.setdefault(said, []).append(option)
            if said == "IGNORED":
                ignored.append(f"{method}: {option}")
        print(f"{method}\n" + "\n".join(f"  {k}: {', '.join(v)}" for k, v in groups.items()))
    count = sum(len(v) for v in rows.values())
    print(f"{count} pairs of method and option, {len(ignored)} ignored {ignored or ''}")
    return bool(ignored)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("imu_fast").setLevel(logging.ERROR)
    sys.exit(main())
