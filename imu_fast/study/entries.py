"""What a comparison compares: methods, curvatures and reweightings as options of ``unlearn``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from imu_fast.curvature.named import curvatures
from imu_fast.errors import check_choice
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.auto import Auto
from imu_fast.unlearning.edit.distillation import SelfDistillation
from imu_fast.unlearning.method import Method
from imu_fast.unlearning.named import METHODS, SUMMARIES

# What every method is tested against: plain ascent of the whole network in training mode, as
# published code does it.
BASELINE = "uniform/all/train"
# What is left of an improvement once the backbone and BatchNorm are frozen.
HEAD_BASELINE = "uniform/head/eval"
AUTO = "auto"
DISTILLED = "self-distillation, network"
# What is no method: the reference; two floors, and what shows that the gap alone can be gamed.
RETRAINED, TWIN = "retrained", "retrained, another seed"
ORIGINAL, FLIPS = "original (nothing done)", "random flips"
REFERENCES = {
    ORIGINAL: "the model as it was trained",
    RETRAINED: "trained anew without the forget set: what the others are compared with",
    TWIN: "the same from other initial weights and in another order",
    FLIPS: "the original's predictions on the forget set made wrong at random, to the depth",
}
RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4)
# A whole network at 0.3 is gone after a step; its runs are also what a comparison's time goes to.
_NETWORK_RATES: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003, 0.001)
_LAYER_RATES: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Entry:
    """One line of the tables.

    Attributes:
        options: of ``unlearn``. kinds: of tasks that it is for.
        rates: the grid that its learning rate is chosen from, largest first.
    """

    options: Mapping[str, Any]
    kinds: tuple[str, ...] = ("class", "random")
    rates: tuple[float, ...] = RATES

    @cached_property
    def method(self) -> Method:
        """The method with these options."""
        options = dict(self.options)
        return METHODS.choose(options.pop("method"), **options)

    @property
    def scope(self) -> str:
        """``"head"`` on cached features, ``"layers"``: some in their network, or ``"all"``."""
        if isinstance(self.method, Ascent):
            return self.method.scope.name
        return "layers" if isinstance(self.method, SelfDistillation) else "head"

    def budget(self, max_steps: int) -> int:
        """Steps of a run: a third of the head's where every step is one of the whole network."""
        return max_steps if self.scope == "head" else max(1, max_steps // 3)

    def taking(self, labels: Tensor, classes: int, **common: Any) -> dict[str, Any]:
        """This entry's options, with those of ``common`` that its method has for this task."""
        method = self.method
        if isinstance(method, Auto):
            _, method = method.edit_of(method.task_of(labels, classes))
        return {k: v for k, v in common.items() if k in method.paths()} | dict(self.options)

    def describe(self) -> dict[str, Any]:
        """For the results: what it does, and its corner of the factorial."""
        flat = self.method.flat()
        summary = SUMMARIES[self.options["method"]]
        if self.options.get("preset") == "paper":
            summary += ", as published"
        return {
            "summary": summary,
            "forget_only": True,
            "scope": self.scope,
            "batchnorm": flat.get("batchnorm", "eval"),
            "weights": flat.get("weights", "uniform"),
            "options": dict(self.options),
        }


def _factorial() -> dict[str, Entry]:
    entries = {}
    for method in ("uniform", "imu", "permuted"):
        for trained, scope in (("all", "all"), ("head", "layers")):
            for batchnorm in ("train", "eval"):
                options = {"method": method, "scope": scope, "batchnorm": batchnorm}
                rates = _NETWORK_RATES if scope == "all" else _LAYER_RATES
                if (trained, batchnorm) == ("head", "eval"):
                    options, rates = {"method": method}, RATES
                entries[f"{method}/{trained}/{batchnorm}"] = Entry(options, rates=rates)
    return entries


def _preconditioned() -> dict[str, Entry]:
    entries = {"margin ascent": Entry({"method": "uniform", "objective": "margin"})}
    objectives = {"features": ("margin", "log1mp", "ce")}
    for precondition in ("features", "ggn", "kfac"):
        for objective in objectives.get(precondition, ("margin", "ce")):
            options = {"precondition": precondition, "objective": objective}
            entries[f"precond. {precondition}, {objective}"] = Entry(
                {"method": "preconditioned", **options}
            )
    return entries


def _network(method: str) -> Entry:
    return Entry({"method": method, "scope": "all"}, rates=_NETWORK_RATES)


ENTRIES: dict[str, Entry] = {
    **_factorial(),
    "imu, paper preset": Entry({"method": "imu", "preset": "paper"}, rates=_LAYER_RATES),
    **{
        f"imu, {name}": Entry({"method": "imu", "curvature": name})
        for name in curvatures()
        if name != "fisher_diag"
    },
    **{
        f"imu, every {when}": Entry({"method": "imu", "reweight": when})
        for when in ("epoch", "batch")
    },
    "loss weights": Entry({"method": "loss_weights"}),
    "npo": Entry({"method": "npo"}),
    "npo, network": _network("npo"),
    "simnpo": Entry({"method": "simnpo"}),
    "simnpo, network": _network("simnpo"),
    "random label": Entry({"method": "random_label"}),
    "random label, network": _network("random_label"),
    "boundary shrink, network": _network("boundary_shrink"),
    **_preconditioned(),
    # Of a head alone; given the network it takes the next for random sets.
    AUTO: Entry({"method": "auto"}, rates=(1.0,)),
    DISTILLED: Entry({"method": "self_distillation"}, kinds=("random",), rates=(0.1,)),
    "single row": Entry({"method": "single_row"}, kinds=("class",)),
    "margin edit": Entry({"method": "margin_edit"}, rates=(1.0,)),
}
# Methods that every trade-off figure draws, beside the one that is nearest to retraining.
HIGHLIGHT = (
    *(BASELINE, HEAD_BASELINE, "imu/head/eval", "precond. features, margin"),
    *(AUTO, DISTILLED),
)

# What a comparison of a few minutes has room for.
QUICK = (
    "imu/all/train",
    "imu/head/eval",
    "permuted/head/eval",
    "uniform/all/eval",
    "npo, network",
    "random label, network",
    "precond. features, margin",
    "single row",
    "margin edit",
    AUTO,
)
ALL = "all"


def entries_named(names: tuple[str, ...]) -> dict[str, Entry]:
    """The entries of these names, and the baselines; ``"all"`` names every one.

    Raises:
        InputError: unknown name.
    """
    for name in names:
        check_choice("methods", name, (ALL, *ENTRIES))
    wanted = tuple(ENTRIES) if ALL in names else (BASELINE, HEAD_BASELINE, *names)
    return {name: entry for name, entry in ENTRIES.items() if name in wanted}
