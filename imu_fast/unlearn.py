"""Influence-reweighted ascent from end to end: score, reweight, unlearn (SPEC sections 3 to 5)."""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from imu_fast.ascent import (
    ForgetSet,
    HeadProblem,
    NetworkProblem,
    OptimizerFactory,
    Problem,
    StopRule,
    feature_preconditioner,
    head_sets,
    invert_second_moment,
)
from imu_fast.backend import record_backends
from imu_fast.capture import WHOLE_MODEL, find_head, linear_layers_matching, preserved
from imu_fast.curvature import curvatures
from imu_fast.errors import (
    EmptySelectionError,
    ImuFastError,
    InputError,
    check_choice,
    check_count,
    check_fraction,
    check_positive,
)
from imu_fast.influence import influence_scores
from imu_fast.ops.head_ascent import OBJECTIVES
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.weighting import influence_weights

logger = logging.getLogger("imu_fast")

METHODS = ("imu", "permuted", "uniform")
SCOPES = ("head", "layers", "all")
# A crossing step is bisected this often: t is then known to 2^-12 of the step.
_BISECTIONS = 12
_STORED_MOMENT = "a second moment [D, D]"
_PAPER = {
    "scope": "layers",
    "top_fraction": 0.1,
    "alpha": 0.2,
    "batchnorm": "train",
    "dropout": "train",
}


class DivergedError(ImuFastError, ArithmeticError):
    """The ascent's loss is no longer finite; the model is as it was before."""


@dataclass
class UnlearnResult:
    """The outcome of :func:`unlearn`.

    Attributes:
        model: the unlearned model (the user's own with ``inplace=True``).
        scores: [n] influence before the first step; None for ``method="uniform"``.
        indices, weights: the selected forget samples [k] and their last weights [k].
        trajectory: one dict per record: step, epoch, forget_loss, forget_accuracy, the weights'
            mean, std and count, and ``<name>_loss``, ``<name>_accuracy`` per watched loader.
        batch_losses: the ascent's loss at every step.
        steps, epochs: optimizer steps made, and epochs begun.
        stopped_by: "epochs", "max_steps", or the stop rule's condition.
        step_fraction: how much of the last step was kept by the bisection, in (0, 1].
        seconds: wall-clock time of the whole call.
        settings: every argument, as used.
        backends: which backend ran each operation.
    """

    model: nn.Module
    scores: Tensor | None
    indices: Tensor
    weights: Tensor
    trajectory: list[dict[str, float]] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0
    stopped_by: str = "epochs"
    step_fraction: float = 1.0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)


def unlearn(
    model: nn.Module,
    forget_loader: Any,
    *,
    method: str = "imu",
    preset: str | None = None,
    scope: str | None = None,
    layers: Any = None,
    lr: float = 0.01,
    epochs: int = 10,
    max_steps: int | None = None,
    batch_size: int = 256,
    alpha: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer: OptimizerFactory | None = None,
    objective: str = "ce",
    precondition: str | Tensor | None = None,
    precondition_eps: float = 1e-2,
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
        method: ``"imu"``; ``"permuted"``: its weights shuffled, the control; ``"uniform"``: plain
            gradient ascent on every forget sample.
        preset: ``"paper"`` behaves as the authors' code: the layers whose name contains ``fc`` are
            scored and trained, the whole model in training mode (so BatchNorm's running statistics
            drift and dropout is active), ``alpha=0.2``, ``top_fraction=0.1``. Arguments given
            explicitly win. The default keeps BatchNorm and dropout in evaluation mode, because
            running statistics of forget data alone change every prediction.
        scope: ``"head"`` (default): the classifier, on features captured once. ``"layers"``: the
            modules named by ``layers`` (default: the head). ``"all"``: every parameter.
        lr, momentum, weight_decay: of SGD; ``optimizer`` replaces it with any torch optimizer: a
            callable from a list of tensors (for the head one tensor [C, D], weight and bias).
        epochs, max_steps: the budget; whichever is used up first.
        alpha: weight of the L1 norm of the trained parameters; default 0 (0.2 for the paper's).
        objective: ``"ce"``, ``"margin"`` or ``"log1mp"``.
        precondition: ``"features"``: multiply the head's ascent gradient by the damped inverse
            second moment of the forget features (``precondition_eps`` relative to its mean
            eigenvalue), keeping its norm; or a stored second moment [D, D]. Head scope only.
        reweight: when scores and weights are computed: ``"once"``, each ``"epoch"``, ``"batch"``.
        batchnorm, dropout: ``"eval"`` or ``"train"``: mode of BatchNorm, and of all other layers,
            during ascent. ``scope="head"`` needs ``"eval"``: its features are captured once.
        curvature, damping, damping_mode, first_row_is_mean: see :func:`influence_scores`.
        top_fraction, clip_quantile, on_empty: see :func:`influence_weights`. With
            ``reweight="batch"`` a batch without negative scores is skipped.
        stop: a :class:`StopRule`, tested after every step; the last step is bisected.
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
    defaults: dict[str, Any] = {
        "scope": "head",
        "top_fraction": 1.0,
        "alpha": 0.0,
        "batchnorm": "eval",
        "dropout": "eval",
    }
    if preset == "paper":
        defaults |= _PAPER
    given = {
        "scope": scope,
        "top_fraction": top_fraction,
        "alpha": alpha,
        "batchnorm": batchnorm,
        "dropout": dropout,
    }
    settings: dict[str, Any] = {
        "method": method,
        "preset": preset,
        "lr": lr,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer": None if optimizer is None else repr(optimizer),
        "objective": objective,
        "precondition": _STORED_MOMENT if isinstance(precondition, Tensor) else precondition,
        "precondition_eps": precondition_eps,
        "reweight": reweight,
        "curvature": curvature,
        "damping": damping,
        "damping_mode": damping_mode,
        "clip_quantile": clip_quantile,
        "on_empty": on_empty,
        "first_row_is_mean": first_row_is_mean,
        "record": record,
        "seed": seed,
    } | {key: defaults[key] if value is None else value for key, value in given.items()}
    _check(settings, model, stop)

    forget = ForgetSet(forget_loader, batch_size)
    loaders: dict[str, Any] = {"forget": forget}
    for name, loader in (watch or {}).items():
        if name in ("forget", "unseen"):
            raise InputError(f"watch has a loader named {name!r}; choose another name")
        loaders[name] = loader
    if stop is not None and stop.unseen is not None:
        loaders["unseen"] = stop.unseen
    names, score_layers = _trained_layers(model, settings, layers)
    make_optimizer = optimizer or partial(
        torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    target = model if inplace else copy.deepcopy(model)
    with record_backends() as used, _rolled_back(target, names), preserved(target, buffers=False):
        problem: Problem
        if settings["scope"] == "head":
            head = "head" if layers is None else find_head(model, layers)[0]
            sets = head_sets(target, head, loaders, progress)
            linear, features = sets["forget"].head, sets["forget"].features
            matrix = None
            if isinstance(precondition, Tensor):
                width = linear.in_features + (linear.bias is not None)
                if precondition.shape != (width, width):
                    raise InputError(
                        f"precondition has shape {tuple(precondition.shape)}; expected the "
                        f"features' second moment [{width}, {width}] (with the bias's 1)"
                    )
                matrix = invert_second_moment(precondition.to(features), precondition_eps)
            elif precondition == "features":
                matrix = feature_preconditioner(
                    features.float() if features.dtype != torch.float64 else features,
                    linear.bias is not None,
                    precondition_eps,
                )
            problem = HeadProblem(
                linear,
                sets,
                make_optimizer,
                objective=objective,
                alpha=settings["alpha"],
                preconditioner=matrix,
            )
        else:
            problem = NetworkProblem(
                target,
                loaders,
                make_optimizer,
                names,
                objective=objective,
                alpha=settings["alpha"],
                batchnorm=settings["batchnorm"],
                dropout=settings["dropout"],
                score_layers=score_layers,
            )
        run = _Run(problem, settings, stop, list(watch or {}), checkpoint, resume, progress)
        result = run.ascend(target)
        problem.finish()
    result.backends = dict(used)
    result.settings = settings
    result.seconds = time.perf_counter() - started
    return result


def _check(settings: dict[str, Any], model: Any, stop: Any) -> None:
    """Every argument that can be checked without touching the model."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    choices: dict[str, tuple[str, ...] | list[str]] = {
        "method": METHODS,
        "scope": SCOPES,
        "objective": OBJECTIVES,
        "reweight": ("once", "epoch", "batch"),
        "batchnorm": ("eval", "train"),
        "dropout": ("eval", "train"),
        "curvature": curvatures(),
        "damping_mode": ("add", "clamp"),
        "on_empty": ("error", "uniform"),
        "record": ("epoch", "step"),
    }
    for name, known in choices.items():
        check_choice(name, settings[name], known)
    for name in ("lr", "damping", "precondition_eps"):
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
    if settings["precondition"] is not None:
        check_choice("precondition", settings["precondition"], ("features", _STORED_MOMENT))
        if settings["scope"] != "head":
            raise InputError(
                f"precondition with scope={settings['scope']!r}: only the head's gradient is "
                "preconditioned; use scope='head'"
            )
    if settings["scope"] == "head" and "train" in (settings["batchnorm"], settings["dropout"]):
        raise InputError(
            "batchnorm='train' or dropout='train' with scope='head': the head is trained on "
            "features captured once, in evaluation mode; use scope='layers' (default: the head)"
        )
    if stop is not None and not isinstance(stop, StopRule):
        raise InputError(f"stop is a {type(stop).__name__}; pass imu_fast.StopRule(...)")


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


@contextmanager
def _rolled_back(model: nn.Module, trained: list[str]) -> Iterator[None]:
    """On any exception, Ctrl-C included, put the trained parameters and all buffers back.

    Without trained parameters (the head is written last, at once) nothing needs to be kept. On
    success nothing is undone, the drift of BatchNorm that ``batchnorm="train"`` asked for included;
    ``preserved`` restores modes, flags and hooks either way.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {name: parameters[name] for name in trained}
    if trained:
        tensors |= dict(model.named_buffers())
    before = {name: t.detach().clone() for name, t in tensors.items()}
    gradients = {name: p.grad for name, p in parameters.items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])
        raise
    finally:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]


class _Run:
    """The ascent loop over a problem: epochs, weights, records, stop rule, checkpoints."""

    def __init__(
        self,
        problem: Problem,
        settings: dict[str, Any],
        stop: StopRule | None,
        watch: list[str],
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.problem, self.settings, self.stop, self.watch = problem, settings, stop, watch
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.resume, self.progress = resume, progress
        self.trajectory: list[dict[str, float]] = []
        self.batch_losses: list[float] = []
        self.step = 0

    def _scores(self, rows: Tensor | None = None) -> Tensor:
        s = self.settings
        return influence_scores(
            self.problem.factors(rows),
            curvature=s["curvature"],
            damping=s["damping"],
            damping_mode=s["damping_mode"],
            first_row_is_mean=s["first_row_is_mean"],
        )

    def _weigh(self, scores: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        s = self.settings
        return influence_weights(
            scores,
            s["top_fraction"],
            s["clip_quantile"],
            on_empty=s["on_empty"],
            permute=s["method"] == "permuted",
            seed=s["seed"] + epoch,
        )

    def _record(self, epoch: int, weights: Tensor, position: float | None = None) -> None:
        forget = self.problem.measure("forget")
        entry = {
            "step": self.step if position is None else position,
            "epoch": epoch,
            "forget_loss": forget.mean_loss,
            "forget_accuracy": forget.accuracy,
            "weight_count": len(weights),
            "weight_mean": float(weights.mean()),
            "weight_std": float(weights.std(unbiased=False)),
        }
        for name in self.watch:
            measured = self.problem.measure(name)
            entry[f"{name}_loss"] = measured.mean_loss
            entry[f"{name}_accuracy"] = measured.accuracy
        self.trajectory.append(entry)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.problem.state().items()}

    def _move_to(self, before: dict[str, Tensor], after: dict[str, Tensor], t: float) -> None:
        """Set the state to ``before + t (after - before)``; integer buffers take ``after``."""
        with torch.no_grad():
            for name, tensor in self.problem.state().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.lerp(before[name], after[name], t))
                else:
                    tensor.copy_(after[name])

    def _bisect(self, before: dict[str, Tensor]) -> float:
        """Shorten the last step to where the stop rule is just met; returns its fraction kept."""
        assert self.stop is not None
        after, low, high = self._snapshot(), 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self._move_to(before, after, middle)
            if self.stop.reached(self.problem):
                high = middle
            else:
                low = middle
        self._move_to(before, after, high)
        return high

    def ascend(self, model: nn.Module) -> UnlearnResult:
        """Run to the end of the budget or to the stop rule."""
        s, problem = self.settings, self.problem
        scored = s["method"] != "uniform"
        scores = self._scores() if scored else None
        device = next(iter(problem.state().values())).device
        indices = torch.arange(problem.n)
        weights = torch.ones(problem.n, device=device)
        if scores is not None:
            indices, weights = self._weigh(scores, 0)
            indices = indices.cpu()
        first_epoch = 0
        if self.checkpoint is not None and self.resume and self.checkpoint.is_file():
            first_epoch, indices, weights, scores = self._load(indices, weights, scores)
        else:
            self._record(0, weights)
        stopped_by, fraction, epoch = "epochs", 1.0, first_epoch - 1
        if self.stop is not None and first_epoch == 0:
            already = self.stop.reached(problem)
            if already is not None:
                return UnlearnResult(
                    model, scores, indices, weights, self.trajectory, stopped_by=already
                )
        total = s["epochs"] * -(-len(indices) // s["batch_size"])
        bar = tqdm(
            total=min(total, s["max_steps"] or total),
            initial=self.step,
            desc="unlearn",
            unit="step",
            disable=not self.progress,
        )
        with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for epoch in range(first_epoch, s["epochs"]):
                torch.manual_seed(s["seed"] + epoch)
                if scored and s["reweight"] == "epoch" and epoch > 0:
                    indices, weights = self._weigh(self._scores(), epoch)
                    indices = indices.cpu()
                outcome = self._epoch(epoch, indices, weights, bar)
                if outcome is not None:
                    stopped_by, fraction = outcome
                    break
                if self.checkpoint is not None:
                    self._save(epoch + 1, indices, weights, scores)
        return UnlearnResult(
            model,
            scores,
            indices,
            weights,
            self.trajectory,
            self.batch_losses,
            self.step,
            epoch + 1,
            stopped_by,
            fraction,
        )

    def _epoch(
        self, epoch: int, indices: Tensor, weights: Tensor, bar: tqdm
    ) -> tuple[str, float] | None:
        """One pass over the selected samples; returns why and where it stopped, if it did."""
        s, problem = self.settings, self.problem
        per_batch = s["reweight"] == "batch" and s["method"] != "uniform"
        pool = torch.arange(problem.n) if per_batch else indices
        generator = torch.Generator().manual_seed(s["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(pool), generator=generator)
        losses: list[Tensor] = []
        end: tuple[str, float] | None = None
        batches = order.split(s["batch_size"])
        if not per_batch and self._host_can_wait(len(batches)):
            full = order[: len(order) // s["batch_size"] * s["batch_size"]]
            full = full.view(-1, s["batch_size"])
            if len(full):
                assert problem.sequence is not None
                losses += problem.sequence(pool[full], weights[full.to(weights.device)]).unbind()
                self.step += len(full)
                bar.update(len(full))
                batches = batches[len(full) :]
        for chosen in batches:
            rows, batch_weights = pool[chosen], weights
            if per_batch:
                try:
                    kept, batch_weights = self._weigh(self._scores(rows), self.step)
                except EmptySelectionError:
                    logger.info("step %d skipped: no negative influence in its batch", self.step)
                    continue
                rows = rows[kept.cpu()]
            else:
                batch_weights = weights[chosen.to(weights.device)]
            before = self._snapshot() if self.stop is not None else {}
            losses.append(problem.step(rows, batch_weights))
            self.step += 1
            bar.update()
            if self.stop is not None:
                self._check_finite(losses[-1:])
                reason = self.stop.reached(problem)
                if reason is not None:
                    fraction = self._bisect(before)
                    end = (reason, fraction)
                    self._record(epoch, weights, self.step - 1 + fraction)
                    break
            if s["record"] == "step":
                self._record(epoch, batch_weights)
            if s["max_steps"] is not None and self.step >= s["max_steps"]:
                end = ("max_steps", 1.0)
                break
        self._check_finite(losses)
        self.batch_losses += torch.stack(losses).tolist() if losses else []
        if s["record"] == "epoch" and (end is None or end[0] == "max_steps"):
            self._record(epoch + 1, weights)
        return end

    def _host_can_wait(self, steps: int) -> bool:
        """Whether nothing is measured, recorded or decided between the next steps."""
        if self.problem.sequence is None or self.stop is not None:
            return False
        limit = self.settings["max_steps"]
        return self.settings["record"] == "epoch" and (limit is None or self.step + steps < limit)

    def _check_finite(self, losses: list[Tensor]) -> None:
        state = self.problem.state().values()
        finite = not losses or bool(torch.isfinite(torch.stack(losses)).all())
        if not finite or not all(bool(torch.isfinite(t).all()) for t in state):
            raise DivergedError(
                f"the ascent diverged by step {self.step} with lr={self.settings['lr']}; lower lr,"
                " stop earlier, or use a bounded objective ('margin')"
            )

    def _save(self, epochs: int, indices: Tensor, weights: Tensor, scores: Tensor | None) -> None:
        assert self.checkpoint is not None
        tensors = {f"state.{k}": v for k, v in self.problem.state().items()}
        plain: dict[str, dict[str, Any]] = {}
        for i, slots in self.problem.optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{key}"] = value
                else:
                    plain.setdefault(str(i), {})[key] = value
        tensors |= {"indices": indices, "weights": weights}
        if scores is not None:
            tensors["scores"] = scores
        run = {
            "epochs": epochs,
            "step": self.step,
            "trajectory": self.trajectory,
            "batch_losses": self.batch_losses,
            "settings": _resumable(self.settings),
            "optimizer": plain,
        }
        save_tensors(self.checkpoint, tensors, {"imu_fast": json.dumps(run)})

    def _load(
        self, indices: Tensor, weights: Tensor, scores: Tensor | None
    ) -> tuple[int, Tensor, Tensor, Tensor | None]:
        assert self.checkpoint is not None
        tensors, metadata = load_tensors(self.checkpoint)
        name = str(self.checkpoint)
        if "imu_fast" not in metadata:
            raise InputError(f"checkpoint={name!r} was not written by unlearn; choose another name")
        run = json.loads(metadata["imu_fast"])
        wanted = json.loads(json.dumps(_resumable(self.settings)))
        changed = {
            k: (run["settings"].get(k), v) for k, v in wanted.items() if run["settings"].get(k) != v
        }
        state = self.problem.state()
        shapes = {k: t.shape for k, t in state.items()}
        stored = {k[6:]: t.shape for k, t in tensors.items() if k.startswith("state.")}
        if scores is not None and not changed and "scores" in tensors:
            same = torch.equal(tensors["scores"], scores.cpu())
            if not same:
                changed["model or forget set"] = ("other scores", "these")
        if changed or shapes != stored:
            raise InputError(
                f"checkpoint={name!r} belongs to another run (differs in {changed or 'shapes'}); "
                "pass resume=False to overwrite it, or another name"
            )
        with torch.no_grad():
            for key, tensor in state.items():
                tensor.copy_(tensors[f"state.{key}"])
        slots: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in run["optimizer"].items()}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, i, slot = key.split(".", 2)
                slots.setdefault(int(i), {})[slot] = tensor.clone()
        restored = self.problem.optimizer.state_dict()
        restored["state"] = slots
        self.problem.optimizer.load_state_dict(restored)
        self.trajectory, self.batch_losses = run["trajectory"], run["batch_losses"]
        self.step = run["step"]
        return (
            run["epochs"],
            tensors["indices"].clone(),
            tensors["weights"].to(weights.device, copy=True),
            scores,
        )


def _resumable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that must agree for a run to be resumed: all but the budget."""
    return {k: v for k, v in settings.items() if k not in ("epochs", "max_steps", "optimizer")}
