"""Influence-reweighted ascent from end to end: score, reweight, unlearn (SPEC sections 3 to 5)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.backend import record_backends
from imu_fast.curvature.named import curvatures
from imu_fast.errors import InputError, check_choice, check_count, check_fraction, check_positive
from imu_fast.model.batches import ForgetSet, split_batch
from imu_fast.model.guard import copied, copies_of, door, preserved, rolled_back
from imu_fast.model.head import WHOLE_MODEL, find_head, linear_layers_matching
from imu_fast.ops.objective import NEEDS_AUXILIARY, OBJECTIVES
from imu_fast.unlearning.ascent.ascent import Run
from imu_fast.unlearning.ascent.head import HeadProblem, head_sets
from imu_fast.unlearning.ascent.network import NetworkProblem
from imu_fast.unlearning.ascent.optimizer import OptimizerFactory
from imu_fast.unlearning.ascent.preconditioners import Precondition, describe, preconditioner
from imu_fast.unlearning.depth import OnMilestone, StopRule
from imu_fast.unlearning.edit.margin_edit import Edit
from imu_fast.unlearning.method import Method
from imu_fast.unlearning.named import METHODS, methods
from imu_fast.unlearning.result import DivergedError, UnlearnResult
from imu_fast.unlearning.subject import Problem

__all__ = ["DivergedError", "UnlearnResult", "unlearn"]

SCOPES = ("head", "layers", "all")
_DEFAULTS: dict[str, Any] = {
    "lr": 0.01,
    "epochs": 10,
    "scope": "head",
    "top_fraction": 1.0,
    "alpha": 0.0,
    "batchnorm": "eval",
    "dropout": "eval",
    "objective": "ce",
    "precondition": None,
    "rows": "all",
}
_PAPER = {
    "scope": "layers",
    "top_fraction": 0.1,
    "alpha": 0.2,
    "batchnorm": "train",
    "dropout": "train",
}


@door
def unlearn(
    model: nn.Module,
    forget_loader: Any,
    *,
    method: str = "imu",
    preset: str | None = None,
    scope: str | None = None,
    layers: Any = None,
    lr: float | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 256,
    alpha: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer: OptimizerFactory | None = None,
    objective: str | None = None,
    precondition: Precondition = None,
    precondition_eps: float = 1e-2,
    rows: str | None = None,
    margin: float = 0.1,
    reweight: str = "once",
    batchnorm: str | None = None,
    dropout: str | None = None,
    curvature: str = "fisher_diag",
    damping: float = 1e-2,
    damping_mode: str = "add",
    top_fraction: float | None = None,
    clip_quantile: float = 0.93,
    on_empty: str = "error",
    first_row_is_mean: bool = False,
    stop: StopRule | None = None,
    milestones: Mapping[str, StopRule] | None = None,
    on_milestone: OnMilestone | None = None,
    watch: Mapping[str, Any] | None = None,
    record: str = "epoch",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = False,
    inplace: bool = True,
) -> UnlearnResult:
    """Make a classifier forget, with the forget set only (IMU, arXiv 2508.01620; SPEC section 5).

    Minimises ``- sum_i w_i f(l_i) / sum_i w_i + alpha ||theta||_1`` per batch, w from influence.

    Args:
        model: a classifier that ends in a linear layer.
        forget_loader: DataLoader, re-iterable of ``(inputs, labels)`` batches, or tensors (X, y).
        method: a name out of :func:`imu_fast.methods`: ``"auto"`` (the best recipe found so far
            for a class or for random samples, see ``imu_fast.methods.auto``), ``"imu"``, its
            control ``"permuted"``, ``"loss_weights"``, ``"uniform"`` (plain gradient ascent),
            ``"npo"``, ``"random_label"``, ``"boundary_shrink"``, ``"preconditioned"``,
            ``"single_row"``, ``"margin_edit"`` (no ascent: one quadratic program). A method is a
            set of defaults for the arguments below; those that are given win.
        preset: ``"paper"`` behaves as the authors' code: the layers whose name contains ``fc`` are
            scored and trained, the whole model in training mode (so BatchNorm's running statistics
            drift and dropout is active), ``alpha=0.2``, ``top_fraction=0.1``. Arguments given
            explicitly win. The default keeps BatchNorm and dropout in evaluation mode, because
            running statistics of forget data alone change every prediction.
        scope: ``"head"`` (default): the classifier, on features captured once. ``"layers"``: the
            modules named by ``layers`` (default: the head). ``"all"``: every parameter.
        lr, momentum, weight_decay: of SGD; ``optimizer`` replaces it with any torch optimizer: a
            callable from a list of tensors (for the head one tensor [C, D], weight and bias).
            Default of lr: 0.01, or the method's own.
        epochs, max_steps: the budget; whichever is used up first. Default: 10 epochs, or the
            method's own.
        alpha: weight of the L1 norm of the trained parameters; default 0 (0.2 for the paper's).
        objective: ``"ce"`` (default), ``"margin"`` or ``"log1mp"``; ``"npo"`` and ``"relabel"``
            come with their methods.
        precondition: ``"features"``, ``"ggn"`` or ``"kfac"``: multiply the head's ascent gradient
            by the damped inverse of the forget features' second moment, or of the forget set's
            curvature (``precondition_eps`` relative to its mean eigenvalue), keeping its norm; or a
            stored second moment [D, D], or a fitted curvature of the training set. Head scope only.
        rows: ``"forgotten"``: only the rows of the head that belong to the forget set's classes
            change; ``"all"`` (default). Head scope only.
        margin: by how much ``"margin_edit"`` lets another class win, in logits.
        reweight: when scores and weights are computed: ``"once"``, each ``"epoch"``, ``"batch"``.
        batchnorm, dropout: ``"eval"`` or ``"train"``: mode of BatchNorm, and of all other layers,
            during ascent. ``scope="head"`` needs ``"eval"``: its features are captured once.
        curvature, damping, damping_mode, first_row_is_mean: see :func:`influence_scores`.
        top_fraction, clip_quantile, on_empty: see :func:`influence_weights`. With
            ``reweight="batch"`` a batch without negative scores is skipped.
        stop: a :class:`StopRule`, tested after every step; the last step is bisected.
        milestones: depths on the way, by name: at each, ``on_milestone(name, record)`` is called
            with the model there (bisected as a stop); without ``stop`` the last one ends the run.
        watch: loaders to measure at every record, by name.
        record: ``"epoch"`` or ``"step"``: how often the trajectory gets an entry.
        checkpoint: a safetensors file, replaced atomically after each epoch; if it exists and
            ``resume``, the run goes on from there and ends as an uninterrupted one would.
        seed: of the batch order, dropout and permuted weights.
        inplace: change the user's model; otherwise a copy.

    Returns:
        UnlearnResult. On any exception, Ctrl-C included, the user's model is as it was.

    Raises:
        InputError, NoHeadFoundError: as SPEC section 8 lists, before any work.
        EmptySelectionError: no forget sample has negative influence.
        DivergedError: the loss became non-finite.
    """
    started = time.perf_counter()
    check_choice("preset", preset or "none", ("none", "paper"))
    check_choice("method", method, methods())
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    recipe = METHODS[method]
    options = dict(recipe.options)
    forget: ForgetSet | None = None
    if recipe.choose is not None:
        forget = ForgetSet(forget_loader, check_count("batch_size", batch_size), model)
        method = recipe.choose(_labels(forget), find_head(model, layers)[1].out_features)
        recipe = METHODS[method]
        options |= recipe.options
        if stop is None and not milestones:
            stop = StopRule(forget_accuracy=0.0)
    given = {
        "lr": lr,
        "epochs": epochs,
        "scope": scope,
        "top_fraction": top_fraction,
        "alpha": alpha,
        "batchnorm": batchnorm,
        "dropout": dropout,
        "objective": objective,
        "precondition": precondition,
        "rows": rows,
    }
    given = {key: value for key, value in given.items() if value is not None}
    chosen = _DEFAULTS | (_PAPER if preset == "paper" else {}) | options | given
    precondition = chosen["precondition"]
    settings: dict[str, Any] = {
        "method": method,
        "preset": preset,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer": None if optimizer is None else repr(optimizer),
        "precondition_eps": precondition_eps,
        "margin": margin,
        "reweight": reweight,
        "curvature": curvature,
        "damping": damping,
        "damping_mode": damping_mode,
        "clip_quantile": clip_quantile,
        "on_empty": on_empty,
        "first_row_is_mean": first_row_is_mean,
        "record": record,
        "seed": seed,
        **chosen,
        "precondition": describe(precondition),
    }
    depths = dict(milestones or {})
    _check(settings, recipe, [*depths.values(), *([] if stop is None else [stop])])

    forget = forget or ForgetSet(forget_loader, batch_size, model)
    loaders: dict[str, Any] = {"forget": forget}
    for name, loader in (watch or {}).items():
        if name in ("forget", "unseen"):
            raise InputError(f"watch has a loader named {name!r}; choose another name")
        loaders[name] = loader
    unseen = [rule.unseen for rule in (stop, *depths.values()) if rule and rule.unseen is not None]
    if unseen:
        loaders["unseen"] = unseen[0]
        if any(other is not unseen[0] for other in unseen):
            raise InputError("stop and milestones name several unseen loaders; pass one to all")
    trained, score_layers = _trained_layers(model, settings, layers)
    make_optimizer = optimizer or partial(
        torch.optim.SGD, lr=settings["lr"], momentum=momentum, weight_decay=weight_decay
    )
    target = model if inplace else copied(model)
    with (
        record_backends() as used,
        rolled_back(target, trained) as kept,
        preserved(target, buffers=False),
    ):
        auxiliary = None
        if recipe.auxiliary is not None and settings["objective"] in NEEDS_AUXILIARY:
            auxiliary = recipe.auxiliary(target, forget, seed)
        problem: Problem
        if settings["scope"] == "head":
            head = "head" if layers is None else find_head(model, layers)[0]
            sets = head_sets(target, head, loaders, progress)
            linear, labels = sets["forget"].head, sets["forget"].labels
            kept += copies_of(linear.parameters())
            mask = None
            if settings["rows"] == "forgotten":
                mask = torch.zeros(linear.out_features, dtype=torch.bool)
                mask[labels.cpu().unique()] = True
            problem = HeadProblem(
                linear,
                sets,
                make_optimizer,
                objective=settings["objective"],
                alpha=settings["alpha"],
                auxiliary=auxiliary,
                rows=mask,
            )
            if precondition is not None and not recipe.edits:
                problem.preconditioner = preconditioner(
                    precondition, problem.factors()[0], precondition_eps
                )
        else:
            problem = NetworkProblem(
                target,
                loaders,
                make_optimizer,
                trained,
                objective=settings["objective"],
                alpha=settings["alpha"],
                batchnorm=settings["batchnorm"],
                dropout=settings["dropout"],
                score_layers=score_layers,
                auxiliary=auxiliary,
            )
        watched = list(watch or {})
        if recipe.edits:
            assert isinstance(problem, HeadProblem)
            moment = precondition if isinstance(precondition, Tensor) else None
            edit = Edit(problem, settings, stop, depths, on_milestone, watched, moment)
            result = edit.run(target)
        else:
            run = Run(
                problem,
                settings,
                recipe.weights,
                stop,
                depths,
                on_milestone,
                watched,
                checkpoint,
                resume,
                progress,
            )
            result = run.ascend(target)
        problem.finish()
    result.backends = dict(used)
    result.settings = settings
    result.seconds = time.perf_counter() - started
    return result


def _labels(forget: ForgetSet) -> Tensor:
    return torch.cat([split_batch(batch)[2].flatten().cpu() for batch in forget])


def _check(settings: dict[str, Any], recipe: Method, rules: list[Any]) -> None:
    """Every argument that can be checked without touching the model."""
    choices: dict[str, tuple[str, ...] | list[str]] = {
        "scope": SCOPES,
        "objective": OBJECTIVES,
        "reweight": ("once", "epoch", "batch"),
        "batchnorm": ("eval", "train"),
        "dropout": ("eval", "train"),
        "curvature": curvatures(),
        "damping_mode": ("add", "clamp"),
        "on_empty": ("error", "uniform"),
        "record": ("epoch", "step"),
        "rows": ("all", "forgotten"),
    }
    for name, known in choices.items():
        check_choice(name, settings[name], known)
    for name in ("lr", "damping", "precondition_eps", "margin"):
        check_positive(name, settings[name])
    for name in ("momentum", "weight_decay", "alpha"):
        check_positive(name, settings[name], allow_zero=True)
    for name in ("top_fraction", "clip_quantile"):
        check_fraction(name, settings[name])
    for name in ("epochs", "batch_size"):
        check_count(name, settings[name])
    if settings["max_steps"] is not None:
        check_count("max_steps", settings["max_steps"])
    check_count("seed", settings["seed"], minimum=0)
    if settings["objective"] in NEEDS_AUXILIARY and recipe.auxiliary is None:
        raise InputError(
            f"objective={settings['objective']!r} needs to know more of each sample than "
            f"method={settings['method']!r} does; choose the method of that name"
        )
    head_only = {
        "method": recipe.edits,
        "precondition": settings["precondition"] is not None,
        "rows": settings["rows"] != "all",
    }
    for name, wanted in head_only.items():
        if wanted and settings["scope"] != "head":
            raise InputError(
                f"{name}={settings[name]!r} with scope={settings['scope']!r}: it works on the head "
                "alone; use scope='head'"
            )
    if settings["scope"] == "head" and "train" in (settings["batchnorm"], settings["dropout"]):
        raise InputError(
            "batchnorm='train' or dropout='train' with scope='head': the head is trained on "
            "features captured once, in evaluation mode; use scope='layers' (default: the head)"
        )
    for rule in rules:
        if not isinstance(rule, StopRule):
            raise InputError(
                f"stop or a milestone is a {type(rule).__name__}; pass imu_fast.StopRule(...)"
            )


def _trained_layers(
    model: nn.Module, settings: dict[str, Any], layers: Any
) -> tuple[list[str], Any]:
    """Names of the trained parameters, and the layers that are scored."""
    scored: Any = "head"
    if settings["preset"] == "paper" and layers is None and settings["scope"] == "layers":
        layers = linear_layers_matching(model, "fc")
        if not layers:
            raise InputError(
                "preset='paper' trains the linear layers whose name contains 'fc', and this model "
                "has none; name the layers with layers=[...]"
            )
    parameters = [name for name, _ in model.named_parameters()]
    if settings["scope"] == "head":
        return [], scored
    if settings["scope"] == "all":
        return parameters, scored
    modules = dict(model.named_modules())
    if layers is None:
        prefixes = [find_head(model)[0]]
    else:
        wanted = [layers] if isinstance(layers, str | nn.Module) else list(layers)
        by_module = {module: name for name, module in modules.items()}
        prefixes = [by_module.get(x, "") if isinstance(x, nn.Module) else x for x in wanted]
        for given, prefix in zip(wanted, prefixes, strict=True):
            if not prefix or prefix not in modules:
                raise InputError(
                    f"layers has {given!r}, which is no module of the model; its linear layers "
                    f"are {[k for k, m in modules.items() if isinstance(m, nn.Linear)]}"
                )
    if settings["preset"] == "paper":
        scored = prefixes
    if WHOLE_MODEL in prefixes:
        return parameters, scored
    return [p for p in parameters if any(p.startswith(f"{x}.") for x in prefixes)], scored
