"""Unlearning by self-distillation: the model's own predictions, the labels' logits lowered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Self

from imu_fast.errors import (
    InputError,
    SingularMatrixError,
    check_count,
    check_flag,
    check_positive,
)
from imu_fast.model.batches import ForgetSet, as_batches
from imu_fast.model.capture import capture, head_of
from imu_fast.model.guard import modes
from imu_fast.model.head import LinearLayer, check_gradients, resolve
from imu_fast.model.outputs import logits_in_batches
from imu_fast.model.reading import Reading
from imu_fast.options import option, options
from imu_fast.unlearning.confirm import confirm
from imu_fast.unlearning.depth import Depths, StopRule, bisect
from imu_fast.unlearning.edit.inverse import damped_inverse
from imu_fast.unlearning.edit.targets import check_targets, lowered, softened
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.result import DivergedError, UnlearnResult
from imu_fast.unlearning.subject import NetworkSubject, move, snapshot
from imu_fast.unlearning.summary.hessian import Damped, HeadHessian, head_hessian
from imu_fast.unlearning.summary.inner import (
    EXACT_CLASSES,
    capturable,
    inner_hessians,
    inner_layers,
    why_not,
    without_signal,
)
from imu_fast.unlearning.summary.summary import TrainingSummary, check_summary
from imu_fast.unlearning.trajectory import Trajectory

logger = logging.getLogger("imu_fast")

# A step is halved this often at most to find one along which the distillation loss falls: where
# the forget set is predicted with certainty its Hessian is next to nothing, and its inverse large.
_HALVINGS = 60
# Steps towards the same targets; then the margin is doubled, up to this.
_ROUND, _MOST_MARGIN = 40, 1e3


@options
class SelfDistillation(Method):
    """Teach the model its own predictions on the forget set, the labels' logits lowered.

    All labels' logits are lowered by one constant, the least with which the accuracy is that of the
    depth: what a sample is like stays in the targets, how well its label was learned does not
    (distillation to adjusted logits: Dong et al. 2024, UnDIAL). Steps are natural gradients of the
    cross-entropy between targets and predictions, at the head and layers before it, in the metric
    of the training set by K-FAC (Martens and Grosse 2015)::

        theta_l - lr (H_l - H_F,l + ((N - n) lam + eps mu) I)^-1 sum_F g_i

    H_l is the summary's sum over the N training samples at layer l, H_F,l that over the n forget
    samples, lam the weight decay and mu the mean eigenvalue: what the retained data depend on is
    moved least. Without a summary the metric is the forget set's own, ``H_F,l + eps mu I``. lr is
    halved until the loss falls; the step that crosses the depth is bisected.

    It needs a depth that is an accuracy, such as ``StopRule(unseen_accuracy=X)``.

    Args:
        summary: of the training set, by :func:`imu_fast.save_summary`; its ``inner`` layers move.
        layers: which layers move beside the head: names, modules or patterns. None: the summary's;
            without one, the last three before the head that fit into 100 MB.
        margin: by how much more than to a tie the targets' labels are lowered, in logits; doubled
            where forty steps, or a fit that gets no better, have not come to the depth.
        eps: damping, relative to the mean eigenvalue of each layer's matrix.
        lr: of the step; a natural gradient at several layers counts what they share several times.
        max_steps: the budget.
        calibrated: divide the lowered logits by the temperature T >= 1 at which their mean
            confidence is their accuracy on the forget set (Guo et al. 2017).
        targets: probabilities [n, C] in the place of the model's own on the forget set, as a
            teacher's or a mean over augmentations; their labels are lowered alike.
    """

    name = "self_distillation"
    summary: TrainingSummary | None = option(default=None, check=check_summary)
    layers: str | nn.Module | Sequence[str | nn.Module] | None = option(default=None)
    margin: float = option(default=0.2, check=check_positive)
    eps: float = option(default=0.1, check=check_positive)
    lr: float = option(default=0.1, check=check_positive)
    max_steps: int = option(default=200, check=check_count)
    calibrated: bool = option(default=False, check=check_flag)
    targets: Tensor | None = option(default=None, check=check_targets)

    def bind(self, model: nn.Module) -> Self:
        if self.layers is None:
            return self
        return replace(self, layers=[x.name for x in inner_layers(model, self.layers, [])])

    def run(self, job: Job) -> UnlearnResult:
        rules = job.depths.rules
        if not rules or any(rule.accuracy is None for rule in rules):
            what = "stop=None" if not rules else repr(rules[-1])
            raise InputError(
                f"{what} with method='self_distillation': the targets are made for an accuracy; "
                "pass stop=imu_fast.StopRule(unseen_accuracy=X), X the model's accuracy on data "
                "that it never saw"
            )
        return _Distillation(self, job).run()


def movable_layers(
    job_of: tuple[nn.Module, ForgetSet, Reading],
    head: Sequence[str],
    named: Any,
    summary: TrainingSummary | None,
    classes: int,
) -> list[LinearLayer]:
    """The layers that move beside the head; of those that nobody named, none that is frozen.

    Args:
        job_of: model, forget set, how it is read. head: its names.
        named: what ``layers`` says, or None. classes: C.
    """
    model, forget, reading = job_of
    if named is not None:
        return inner_layers(model, named, head)
    wanted: Any = "auto" if summary is None else list(summary.inner) or None
    found = inner_layers(model, wanted, head)
    if any(p.requires_grad for p in model.parameters()):
        moving = ((x, x.module.parameters(recurse=False)) for x in found)
        found = [x for x, own in moving if all(p.requires_grad for p in own)]
    if summary is not None:
        return found
    return capturable(model, found, next(iter(as_batches(forget, model))), reading, classes)


def why_no_head(model: nn.Module, head: LinearLayer) -> str:
    """Why a head cannot be moved with the layers before it; empty if it can."""
    frozen = not all(p.requires_grad for p in head.module.parameters(recurse=False))
    if frozen and any(p.requires_grad for p in model.parameters()):
        return "has requires_grad=False while other parameters do not"
    return why_not(model, head)


class _Distillation:
    """One run: targets and metric made once, steps to each depth."""

    def __init__(self, method: SelfDistillation, job: Job) -> None:
        self.method, self.job = method, job
        model, summary = job.model, method.summary
        names, classes = head_of(model, job.forget, job.reading)
        if len(names) > 1:
            raise InputError(
                f"method='self_distillation': the logits are made of several heads, {names}; use "
                "method='margin_edit'"
            )
        head = resolve(model, names[0])
        if why := why_no_head(model, head):
            raise InputError(
                f"the head {head.name!r} {why}; use method='margin_edit', which edits the head "
                "alone, or name what may move by requires_grad"
            )
        read = model, job.forget, job.reading
        inner = movable_layers(read, names, method.layers, summary, classes)
        if not inner and summary is not None:
            raise InputError(
                "summary has no K-FAC of a layer before the head, which "
                "method='self_distillation' moves; save one with inner_layers=, or use "
                "method='newton_removal'"
            )
        if summary is not None:
            summary.check_inner(inner)
            summary.check_head(job.model, head.matrix, head.bias is not None, job.forget.n)
        self._metrics = self._fit(inner, head, classes)
        self.layers = [*inner, head]
        check_gradients(layer.module for layer in self.layers)
        own = {id(p) for layer in self.layers for p in layer.module.parameters(recurse=False)}
        chosen = [name for name, p in model.named_parameters() if id(p) in own]
        job.keep(p for p in model.parameters() if id(p) in own)
        job.keep(model.buffers())
        self.subject = NetworkSubject(model, job.sets, chosen, job.reading)
        by_id = {id(p): name for name, p in self.subject.parameters.items()}
        self._names = [
            [by_id[id(p)] for p in (layer.module.weight, layer.module.bias) if p is not None]
            for layer in self.layers
        ]
        self.trajectory = Trajectory(self.subject, job.watch, job.callback)
        self._logits, self._labels = self._own(classes)
        self.steps, self._lr = 0, method.lr

    def _fit(self, inner: list[LinearLayer], head: LinearLayer, classes: int) -> list[Damped]:
        """The damped inverse at each layer, the head last; takes out of inner what cannot move."""
        method, job, summary = self.method, self.job, self.method.summary
        names = [layer.name for layer in inner]
        at_head = capture(job.model, job.forget, **job.reading.given())
        of_forget = inner_hessians(job.model, job.forget, names, job.reading, classes)
        if summary is None:
            if method.layers is None:  # nobody named those that no sample's loss depends on
                for name in without_signal(of_forget):
                    inner.pop(names.index(name))
                    names.remove(name)
            found: list[HeadHessian] = [*(of_forget[name] for name in names), head_hessian(at_head)]
            return [damped_inverse(x, 0.0, method.eps, method.name, whole=False) for x in found]
        device = head.weight.device
        decay = (summary.n - job.forget.n) * summary.weight_decay
        whole = summary.hessian.to(device)
        rest = whole - head_hessian(at_head, whole.kind)
        at_the_head = damped_inverse(rest, decay, method.eps, method.name)
        inverses: list[Damped] = []
        for name in names:
            of_all, of_some = summary.inner[name].to(device), of_forget[name]
            try:
                found_here = damped_inverse(of_all - of_some, decay, method.eps, method.name)
            except (InputError, SingularMatrixError) as error:
                if classes <= EXACT_CLASSES:
                    raise
                # Of other draws than the summary's: the difference of the two is no sum over draws.
                logger.info("layer %r by its share of the signals: %s", name, error)
                left = of_all.without_inputs_of(of_some)
                found_here = damped_inverse(left, decay, method.eps, method.name)
            inverses.append(found_here)
        return [*inverses, at_the_head]

    def _own(self, classes: int) -> tuple[Tensor, Tensor]:
        """What targets are made of [n, C], float64, and labels [n]."""
        job, targets = self.job, self.method.targets
        parts = list(logits_in_batches(job.model, job.forget, job.reading, "unlearn()"))
        labels = torch.cat([y for _, y in parts])
        if targets is None:
            return torch.cat([z.double() for z, _ in parts]), labels
        if targets.shape != (job.forget.n, classes):
            raise InputError(
                f"targets has shape {tuple(targets.shape)}; the forget set needs "
                f"{(job.forget.n, classes)}"
            )
        # Of a certain teacher the others' logarithms are -inf, between which no label is lowered.
        least = torch.finfo(torch.float32).tiny
        return targets.detach().to(labels.device).double().clamp_min(least).log(), labels

    def run(self) -> UnlearnResult:
        job, depths = self.job, self.job.depths
        self.trajectory.record(0, 0)
        with tqdm(
            total=self.method.max_steps, desc="unlearn", unit="step", disable=not job.progress
        ) as self._bar:
            return self._run(depths)

    def _run(self, depths: Depths) -> UnlearnResult:
        job = self.job
        reached, fraction = None, 1.0
        stretch: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        milestones = dict(depths.milestones or {})
        ends = [*milestones.items(), *([("", depths.stop)] if depths.stop is not None else [])]
        for name, rule in ends:
            assert rule is not None
            before = self.steps
            reached, found, moved = self._to(rule)
            if self.steps > before:  # else all is where the last step to another depth has left it
                fraction, stretch = found, moved
            if name and reached and depths.on_milestone is not None:
                self.subject.finish()
                depths.on_milestone(name, self.trajectory.entry(self._at(fraction), 0))
        last = ends[-1][1]

        def move_to(t: float) -> None:
            if stretch is not None:
                move(self.subject, *stretch, t)

        kept, own = confirm(
            self.subject, self.trajectory, last if reached else None, fraction, move_to
        )
        self.trajectory.records[-1]["step"] = self._at(kept)
        stopped = "milestones" if depths.stop is None else reached
        spent = "max_steps" if self.steps >= self.method.max_steps else "no_descent"
        return UnlearnResult(
            job.model,
            None,
            torch.arange(job.forget.n),
            torch.ones(job.forget.n, device=self.subject.device),
            self.trajectory.records,
            steps=self.steps,
            stopped_by=(stopped if reached else None) or spent,
            step_fraction=kept,
            reached=own is not None,
            settings={
                "layers": [layer.name for layer in self.layers],
                "damping": [metric.damping for metric in self._metrics],
            },
        )

    def _at(self, fraction: float) -> float:
        return self.steps - 1 + fraction if self.steps else 0.0

    def _to(self, rule: StopRule) -> tuple[str | None, float, Any]:
        """Steps until the rule holds, or the budget ends: why, how much of the last, and that."""
        met = rule.reached(self.trajectory)
        stretch, fraction, margin, left = None, 1.0, self.method.margin, 0
        aim = self._aim(rule, margin)
        loss, gradients = self._loss(aim)
        while met is None and self.steps < self.method.max_steps:
            before = snapshot(self.subject)
            after = self._step(gradients, aim, loss, before) if left < _ROUND else None
            if after is None:
                if margin > _MOST_MARGIN:
                    break
                # The fit is as good as it gets, and short of the depth.
                margin, left, self._lr = 2 * margin, 0, self.method.lr
                aim = self._aim(rule, margin)
                loss, gradients = self._loss(aim)
                continue
            loss, gradients = after
            self.steps, left = self.steps + 1, left + 1
            self._bar.update()
            self.trajectory.moved()
            met, stretch = rule.reached(self.trajectory), (before, snapshot(self.subject))
            if met is not None:
                fraction = self._bisected(rule, *stretch)
                met = rule.reached(self.trajectory)
            self.trajectory.record(self._at(fraction), 0)
        return met, fraction, stretch

    def _aim(self, rule: StopRule, margin: float) -> Tensor:
        """Targets [n, C] for the rule's accuracy."""
        assert rule.accuracy is not None
        aim = lowered(self._logits, self._labels, rule.accuracy, margin)
        return (softened(aim, self._labels) if self.method.calibrated else aim).softmax(dim=1)

    def _bisected(self, rule: StopRule, before: dict[str, Tensor], after: Any) -> float:
        def reached(t: float) -> bool:
            move(self.subject, before, after, t)
            self.trajectory.moved()
            return rule.reached(self.trajectory) is not None

        fraction = bisect(reached)
        reached(fraction)
        return fraction

    def _step(
        self, gradients: list[Tensor], aim: Tensor, loss: float, before: dict[str, Tensor]
    ) -> tuple[float, list[Tensor]] | None:
        """A step along which the loss falls; None where there is none: the model is as it was."""
        ways = [m.solve(g) for m, g in zip(self._metrics, gradients, strict=True)]
        for _ in range(_HALVINGS):
            with torch.no_grad():
                for layer, names, way in zip(self.layers, self._names, ways, strict=True):
                    self._move(layer, names, before, -self._lr * way)
            found, after = self._loss(aim)
            if found < loss:
                return found, after
            self._lr /= 2
        move(self.subject, before, before, 1.0)
        self.subject.finish()
        return None

    def _move(
        self, layer: LinearLayer, names: list[str], before: dict[str, Tensor], step: Tensor
    ) -> None:
        """Weight and bias by the columns of a step [C, D]."""
        state, width = self.subject.trained, layer.weight.shape[1]
        weight = state[names[0]]
        # Where in the module's own layout each entry of the matrix is.
        place = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
        flat = torch.empty(weight.numel(), dtype=step.dtype, device=step.device)
        flat[layer.like_weight(place)] = step[:, :width]
        weight.copy_(before[names[0]] + flat.view(weight.shape).to(weight))
        if len(names) > 1:
            state[names[1]].copy_(before[names[1]] + step[:, width].to(weight))

    def _loss(self, aim: Tensor) -> tuple[float, list[Tensor]]:
        """``-sum_i sum_c t_ic log p_ic`` and its gradient at each layer, [C, D] float64."""
        subject, place, total = self.subject, 0, 0.0
        subject.finish()
        parameters = [subject.parameters[name] for names in self._names for name in names]
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        with modes(subject.model, batchnorm="eval", dropout="eval"), torch.enable_grad():
            for batch in subject.forget:
                logits, _ = subject.forward(batch)
                some = aim[place : place + len(logits)]
                place += len(logits)
                logs = logits.double().log_softmax(dim=1)
                loss = -(some * logs).sum()
                if not bool(torch.isfinite(loss)):
                    raise DivergedError("self_distillation: the logits are no longer finite")
                total += float(loss.detach())
                for held, g in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                    held += g
        found = iter(sums)
        matrices = []
        for layer, names in zip(self.layers, self._names, strict=True):
            columns = [layer.like_weight(next(found))]
            columns += [next(found)[:, None]] if len(names) > 1 else []
            matrices.append(torch.cat(columns, dim=1))
        return total, matrices
