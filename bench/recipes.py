"""Recipes of forgetting beside retrained models: ``python bench/recipes.py --data FILE.npz``.

Small networks are trained, and trained again without what is to be forgotten; every recipe starts
from the first and is compared with the second at a depth that a user can name: of random samples
the model's accuracy on images that it never saw, of a class zero. Development seeds and classes
(``--part development``) chose what ``auto`` takes; the report is of other seeds and classes; and
``--part again --sets cifar10`` is ``auto`` alone at random samples of twelve seeds more. Rows,
means and Student's intervals over seeds go to ``results/recipes.json``, tables to the terminal.
Without ``--data`` (CIFAR-10, an .npz of JPEG files) there are the digits alone. Models are kept in
``--cache``, so that an interrupted run goes on.
"""

from __future__ import annotations

import copy
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from recipes_held import last_block_removal, quantiles, shifted
from recipes_models import RETAIN, WEIGHT_DECAY, Models, Problem
from recipes_retain import METHODS as RETAINING
from recipes_retain import chosen as constants
from recipes_tables import AUTO, FLIPS, METRICS, ORIGINAL, SOFTER, TWIN, means, shown
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.evaluation.gap import average_gap, random_flips
from imu_fast.evaluation.metrics import distance, membership
from imu_fast.model.outputs import Outputs
from imu_fast.storage import replacing
from imu_fast.study.cells import pack, rounded, unpack
from imu_fast.unlearning.depth import bisect

HERE = Path(__file__).parent
PARTS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "development": ((0, 1, 2), ("class-1", "class-4")),
    "report": ((20, 21, 22, 23, 24), ("class-2", "class-6")),
    # Random samples alone, for intervals that five seeds leave wide.
    "again": (tuple(range(40, 52)), ()),
}
RANDOM = ("random-1", "random-5", "random-10")
# Of the ascents that need one: the largest with which the depth takes so many steps or more.
# Predictions that forget nothing and are softer: what a lower KL alone may come from.
TEMPERATURE = 1.5
RATES, STEPS, BUDGET = (1.0, 0.1, 0.01, 0.001), 20, 400


@dataclass(frozen=True)
class Recipe:
    """What is done to a head, or to a network.

    Attributes:
        options: of ``unlearn``. given: what it is given beside the forget set, in words.
        summary: whether it takes the training set's. rates: of an ascent. deep: whether it goes to
            the task's depth, or as far as it goes of itself.
        network: whether it changes the network, or its head on features.
        targets: of self-distillation, made of the problem.
        run: in the place of ``unlearn``: of the problem, the summary and the depth.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    summary: bool = False
    rates: tuple[float, ...] = ()
    deep: bool = True
    kinds: tuple[str, ...] = ("class", "random")
    network: bool = False
    given: str = ""
    targets: Callable[[Problem], Tensor] | None = None
    run: Callable[[Problem, imu.TrainingSummary, imu.StopRule], nn.Module] | None = None

    @property
    def needs(self) -> str:
        return self.given or ("summary" if self.summary else "forget set")


def class_means(problem: Problem, summary: imu.TrainingSummary, stop: imu.StopRule) -> nn.Linear:
    """Towards the head of class means and shared covariance of what is left, as far as is asked.

    ``W_c = Sigma^-1 mu_c`` on the features, as ``mu`` and ``Sigma`` are without the forget set.
    """
    x, y = problem.features["forget"].double(), problem.sets["forget"][1]
    classes, d = summary.class_means.shape
    left = summary.class_counts - torch.bincount(y, minlength=classes)
    sums = summary.class_means * summary.class_counts[:, None]
    sums = sums.index_add(0, y, x, alpha=-1.0)
    mu = sums / left.clamp_min(1)[:, None]
    n = int(left.sum())
    second = (summary.n * summary.second_moment[:d, :d] - x.T @ x) / n
    share = left.double() / n
    within = second - (mu * share[:, None]).T @ mu
    within += 1e-2 * within.trace() / d * torch.eye(d, dtype=torch.float64)
    weight = torch.linalg.solve(within, mu.T).T
    bias = share.clamp_min(1e-6).log() - 0.5 * (weight * mu).sum(dim=1)
    head = copy.deepcopy(problem.head)
    start = head.weight.detach().clone(), head.bias.detach().clone()
    target = weight.to(start[0]), bias.to(start[1])

    def reached(t: float) -> bool:
        with torch.no_grad():
            head.weight.copy_(torch.lerp(start[0], target[0], t))
            head.bias.copy_(torch.lerp(start[1], target[1], t))
            right = head(problem.features["forget"]).argmax(dim=1) == y
        assert stop.accuracy is not None
        return float(right.double().mean()) <= stop.accuracy

    if not reached(0.0) and reached(1.0):
        reached(bisect(reached))
    return head


def _retaining(name: str) -> Recipe:
    """What uses retain data, for scale, with the constants of the development models."""

    def run(problem: Problem, summary: imu.TrainingSummary, stop: imu.StopRule) -> nn.Module:
        return RETAINING[name](problem, **constants(name, problem.task.kind))

    return Recipe(run=run, deep=False, given="retain data")


_MARGIN: dict[str, Any] = {"method": "margin_edit"}
_NEWTON: dict[str, Any] = {"method": "newton_removal"}
_SELF: dict[str, Any] = {"method": "self_distillation"}
_CALIBRATED = {**_SELF, "calibrated": True}
_DISTILLED: dict[str, Any] = {"network": True, "kinds": ("random",)}
RECIPES: dict[str, Recipe] = {
    "single row": Recipe({"method": "single_row"}, rates=RATES, kinds=("class",)),
    "margin edit, S of forget set": Recipe(_MARGIN),
    "margin edit, GGN of forget set": Recipe({**_MARGIN, "metric": "ggn"}),
    "margin edit, S of summary": Recipe({**_MARGIN, "metric": "features"}, summary=True),
    "margin edit, GGN of summary": Recipe({**_MARGIN, "metric": "ggn"}, summary=True),
    "newton removal, forget set": Recipe(_NEWTON),
    "newton removal, summary": Recipe(_NEWTON, summary=True),
    "newton removal, summary, k = 1": Recipe(_NEWTON, summary=True, deep=False),
    "newton removal, margin edit, summary": Recipe(
        {**_NEWTON, "then": "margin_edit"}, summary=True, kinds=("random",)
    ),
    "class means": Recipe(summary=True, run=class_means),
    "npo": Recipe({"method": "npo"}, rates=RATES),
    "simnpo": Recipe({"method": "simnpo"}, rates=RATES),
    "newton removal, last block, summary": Recipe(summary=True, run=last_block_removal),
    "self-distillation, forget set": Recipe(_SELF, network=True),
    "self-distillation, summary": Recipe(_SELF, summary=True, network=True),
    "self-distillation, calibrated, forget set": Recipe(
        {**_SELF, "calibrated": True}, **_DISTILLED
    ),
    "self-distillation, calibrated, summary": Recipe(
        {**_SELF, "calibrated": True}, summary=True, **_DISTILLED
    ),
    "self-distillation, shifted images, summary": Recipe(
        _SELF, summary=True, targets=shifted, **_DISTILLED
    ),
    "self-distillation, held-out quantiles": Recipe(
        {**_SELF, "margin": 0.02}, targets=quantiles, given="held-out data", **_DISTILLED
    ),
    "auto": Recipe({"method": "auto"}, network=True),
    "auto, summary": Recipe({"method": "auto"}, summary=True, network=True),
    **{name: _retaining(name) for name in RETAINING},
}


def unlearned(
    recipe: Recipe, problem: Problem, summary: imu.TrainingSummary, stop: imu.StopRule
) -> nn.Module:
    """A copy of the head after the recipe; or of the network."""
    if recipe.run is not None:
        return recipe.run(problem, summary, stop)
    data = problem.features["forget"], problem.sets["forget"][1]
    model: nn.Module = nn.Sequential(problem.head)
    if recipe.network:
        data, model = problem.sets["forget"], problem.model
    given: dict[str, Any] = {"summary": summary} if recipe.summary else {}
    if recipe.options["method"] == "auto":
        # As a user would: held-out data say how deep, and whether at all.
        known = {"unseen": problem.models.data.validation}
        given |= {"task": "class"} if problem.task.kind == "class" else known
    elif recipe.deep:
        given["stop"] = stop
    if recipe.targets is not None:
        given["targets"] = recipe.targets(problem)
    start = model
    for lr in recipe.rates or (None,):
        if lr is not None:
            given |= {"lr": lr, "epochs": BUDGET, "max_steps": BUDGET}
        try:
            found = imu.unlearn(start, data, inplace=False, **recipe.options, **given)
        except imu.DivergedError:
            continue
        model = found.model
        if found.steps >= STEPS:
            break
    return model[0] if isinstance(model, nn.Sequential) and not recipe.network else model


def seen(model: nn.Module, problem: Problem) -> dict[str, Outputs]:
    """What a head makes of the features, or a network of the images."""

    def logits(name: str) -> Tensor:
        if isinstance(model, nn.Linear):
            return model(problem.features[name])
        return torch.cat([model(part) for part in problem.sets[name][0].split(500)])

    with torch.no_grad():
        return {name: Outputs(logits(name), y) for name, (_, y) in problem.sets.items()}


class Yardstick:
    """How far outputs are from the retrained model's."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.reference, self.twin = (
            {name: Outputs(z, problem.sets[name][1]) for name, z in logits.items()}
            for logits in problem.retrained
        )
        self._of_reference = self._measured(self.reference)

    def _measured(self, outputs: Mapping[str, Outputs]) -> dict[str, float]:
        attack = membership(
            outputs["forget"],
            outputs["retain"],
            outputs["unseen"],
            heldout=outputs["test"],
            seed=self.problem.models.seed,
        )
        found = {f"{on}_accuracy": outputs[on].accuracy for on in ("forget", "retain", "test")}
        return found | {"membership": attack["svc"]}

    def row(self, outputs: Mapping[str, Outputs]) -> dict[str, float]:
        """``METRICS`` of them."""
        ours = self._measured(outputs)
        found = {name.removesuffix("_accuracy"): value for name, value in ours.items()}
        found["gap"] = average_gap(ours, self._of_reference)
        for name, on in (("kl", "forget"), ("kl_test", "test")):
            found[name] = distance(outputs[on], self.reference[on])["kl"]
        return {name: found[name] for name in METRICS}


def rows_of(problem: Problem, recipes: Mapping[str, Recipe]) -> Iterator[dict[str, Any]]:
    """A row of every recipe, and of what is none."""
    yardstick, kind = Yardstick(problem), problem.task.kind
    accuracy = problem.unseen_accuracy if kind == "random" else 0.0
    stop = imu.StopRule(unseen_accuracy=accuracy)
    with tempfile.TemporaryDirectory() as folder:
        summary = imu.save_summary(
            problem.model,
            problem.models.data.train,
            Path(folder) / "summary.safetensors",
            weight_decay=WEIGHT_DECAY,
            unseen=problem.models.data.validation,
        )
    original = seen(problem.head, problem)
    flipped = {**original, "forget": random_flips(original["forget"], accuracy)}
    softer = {k: Outputs(v.logits / TEMPERATURE, v.labels) for k, v in original.items()}
    outputs = {ORIGINAL: original, TWIN: yardstick.twin, FLIPS: flipped, SOFTER: softer}
    for name, found in outputs.items():
        yield {"method": name, "depth": accuracy, **yardstick.row(found)}
    for name, recipe in recipes.items():
        if kind in recipe.kinds:
            model = unlearned(recipe, problem, summary, stop)
            yield {"method": name, "depth": accuracy, **yardstick.row(seen(model, problem))}


def main(
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as an .npz of JPEG files")] = None,
    part: Annotated[str, typer.Option(help="development, report or again")] = "report",
    cache: Annotated[Path, typer.Option(help="folder of trained models")] = Path("recipes-cache"),
    out: Annotated[Path, typer.Option(help="JSON file, gone on with")] = HERE
    / "results"
    / "recipes.json",
    seeds: Annotated[str, typer.Option(help="some of the part's, by commas")] = "",
    tasks: Annotated[str, typer.Option(help="some of the part's, by commas")] = "",
    sets: Annotated[str, typer.Option(help="digits,cifar10")] = "",
) -> None:
    torch.set_num_threads(1)
    every, classes = PARTS[part]
    chosen = [int(s) for s in seeds.split(",")] if seeds else every
    recipes = {name: RECIPES[name] for name in (AUTO if part == "again" else RECIPES)}
    wanted = tuple(tasks.split(",")) if tasks else (*RANDOM, *classes)
    names = sets.split(",") if sets else ["digits", *(["cifar10"] if data else [])]
    rows = unpack(json.loads(out.read_text())["rows"]) if out.exists() else []
    for name in names:
        for seed in chosen:
            models = Models(name, data, cache, seed)
            for task in wanted:
                key = {"part": part, "data": name, "task": task, "seed": seed}
                rows = [r for r in rows if any(r[k] != v for k, v in key.items())]
                rows += [{**key, **row} for row in rows_of(Problem.of(models, task), recipes)]
            write(out, rows)
    print(shown([line for line in means(rows) if line["part"] == part]))


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Rows and their means to four figures, and what they are of."""
    about = {
        "versions": {
            "imu_fast": imu.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "parts": PARTS,
        "retain_images_measured": RETAIN,
        "needs": {name: recipe.needs for name, recipe in RECIPES.items()},
    }
    found = {"about": about, "rows": pack(rows), "means": pack(means(rows))}
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rounded(found).items()]
    with replacing(out) as temporary:
        temporary.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    typer.run(main)
