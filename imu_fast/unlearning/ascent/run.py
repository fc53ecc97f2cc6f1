"""One run of an ascent: epochs, weights, records, depths, checkpoints."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from imu_fast.errors import EmptySelectionError, InputError, is_finite
from imu_fast.model.loss import check_labelled
from imu_fast.unlearning.ascent.step import Steps
from imu_fast.unlearning.ascent.weights import Weights, by_index
from imu_fast.unlearning.checkpoint import Checkpoint, Progress
from imu_fast.unlearning.confirm import confirm
from imu_fast.unlearning.depth import StopRule, bisect
from imu_fast.unlearning.method import Job
from imu_fast.unlearning.result import DivergedError, UnlearnResult
from imu_fast.unlearning.subject import move, snapshot
from imu_fast.unlearning.trajectory import Trajectory, spread

logger = logging.getLogger("imu_fast")


def _labelled(job: Job) -> Tensor:
    """The forget samples that have a label, [k] on the CPU; those that have none are said.

    Raises:
        InputError: none has one.
    """
    loss = job.reading.loss
    found = []
    for batch in job.forget:
        valid = loss.valid(batch.labels.flatten()).view(batch.n, -1)
        if job.sequences and getattr(loss, "shift", False) is True:
            valid = valid[:, 1:]
        found.append(valid.any(dim=1).cpu())
    labelled = torch.cat(found)
    rows = torch.nonzero(labelled).flatten()
    if not len(rows):
        check_labelled(0, len(labelled), loss)
    if len(rows) < len(labelled):
        logger.warning(
            "%d of %d forget samples have no label at any position: they are neither forgotten nor "
            "counted",
            len(labelled) - len(rows),
            len(labelled),
        )
    return rows


def _seed(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which formats a stack for every backend that has not been used."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class Plan(Protocol):
    """What a run does how often; of :class:`imu_fast.Ascent`."""

    @property
    def weights(self) -> Weights: ...
    @property
    def epochs(self) -> int: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def record(self) -> str | None: ...


class Run:
    """One run of an ascent.

    Passing a milestone (its step bisected, as a stop's) calls ``on_milestone`` with the model at
    that depth; then ascent goes on from where it was. Without a stop rule the last one ends the
    run.
    """

    def __init__(self, method: Plan, steps: Steps, job: Job) -> None:
        self.method, self.steps, self.subject, self.job = method, steps, steps.subject, job
        self.stop: StopRule | None = job.depths.stop
        self.pending = dict(job.depths.milestones or {})
        self.ends_with_milestones = bool(self.pending) and self.stop is None
        self.trajectory = Trajectory(self.subject, job.watch, job.callback)
        # A record is a pass over every watched set: none on the way that nobody asked for.
        looked_on = bool(self.trajectory.watched) or job.callback is not None
        self._when = method.record or ("epoch" if looked_on else "ends")
        self.batch_losses: list[float] = []
        self.labelled = _labelled(job)
        self.step = 0
        # Where the last step began and ended, once it has been bisected.
        self.stretch: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self.checkpoint: Checkpoint | None = None
        if job.checkpoint is not None:
            self.checkpoint = Checkpoint(job.checkpoint, self.subject, steps.optimizer, job.belongs)

    def ascend(self) -> UnlearnResult:
        """Run to the end of the budget or to the stop rule."""
        try:
            return self._ascend()
        except DivergedError as error:
            rates = ", ".join(f"{group['lr']:g}" for group in self.steps.optimizer.param_groups)
            raise DivergedError(
                f"the ascent diverged by step {self.step} with lr={rates}: {error}; lower lr, "
                "stop earlier, or use a bounded objective ('margin')"
            ) from None

    def _ascend(self) -> UnlearnResult:
        method, seed = self.method, self.job.seed
        scores = self.method.weights.scores(self.subject)
        device = next(iter(self.subject.state().values())).device
        indices, weights = self._weigh(scores, 0, device)
        first_epoch = 0
        if self.checkpoint is not None and self.job.resume and self.checkpoint.path.is_file():
            there = self._progress(0, indices, weights, scores)
            there = self.checkpoint.load(there)
            first_epoch, self.step = there.epochs, there.step
            indices, weights = there.indices, there.weights
            self.trajectory.records, self.batch_losses = there.records, there.batch_losses
            self.trajectory.moved()
            for name in there.passed:
                self.pending.pop(name, None)
            self.checkpoint.check_budget(there, method.epochs, method.max_steps)
            if there.step == method.max_steps:
                return self._result(scores, indices, weights, "max_steps", first_epoch)
            if there.ended is not None:
                wanted, stopped_by, fraction = there.ended
                if wanted != self._wanted:
                    raise InputError(
                        f"checkpoint={str(self.checkpoint.path)!r} is of a run that has ended at "
                        f"{wanted}; pass resume=False, or another name, to go to {self._wanted}"
                    )
                return self._result(scores, indices, weights, stopped_by, first_epoch, fraction)
        else:
            self._record(0, weights)
            if self.checkpoint is not None:
                self.checkpoint.save(self._progress(0, indices, weights, scores))
        stopped_by, fraction, epoch = "epochs", 1.0, first_epoch - 1
        if first_epoch == 0:
            here = snapshot(self.subject) if self.pending else {}
            self._pass_milestones(here, 0, weights)
            already = self.stop.reached(self.trajectory) if self.stop is not None else None
            if self.ends_with_milestones and not self.pending:
                already = "milestones"
            if already is not None:
                return self._result(scores, indices, weights, already)
        total = method.epochs * -(-len(indices) // method.batch_size)
        bar = tqdm(
            total=min(total, method.max_steps or total),
            initial=self.step,
            desc="unlearn",
            unit="step",
            disable=not self.job.progress,
        )
        with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for epoch in range(first_epoch, method.epochs):
                _seed(seed + epoch, device)
                if method.weights.reweight == "epoch" and epoch > 0:
                    indices, weights = self._weigh(self._scores(None), epoch, device)
                outcome = self._epoch(epoch, indices, weights, bar)
                if outcome is not None:
                    stopped_by, fraction = outcome
                    if self.checkpoint is not None and stopped_by != "max_steps":
                        done = self._progress(epoch + 1, indices, weights, scores)
                        done.ended = self._wanted, stopped_by, fraction
                        self.checkpoint.save(done)
                    break
                if self.checkpoint is not None:
                    self.checkpoint.save(self._progress(epoch + 1, indices, weights, scores))
        return self._result(scores, indices, weights, stopped_by, epoch + 1, fraction)

    def _weigh(
        self, scores: Tensor | None, epoch: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Indices on the CPU, where batches are drawn, and weights."""
        if scores is None:
            # As exact as what they multiply: a step in float64 has no share rounded to float32.
            wide = any(t.dtype == torch.float64 for t in self.subject.state().values())
            dtype = torch.float64 if wide else torch.float32
            return self.labelled, torch.ones(len(self.labelled), dtype=dtype, device=device)
        indices, weights = self.method.weights.weigh(scores, self.job.seed + epoch)
        return indices.cpu(), weights

    def _progress(
        self, epochs: int, indices: Tensor, weights: Tensor, scores: Tensor | None
    ) -> Progress:
        records, losses = self.trajectory.records, self.batch_losses
        passed = self._passed
        return Progress(epochs, self.step, records, losses, indices, weights, scores, passed)

    @property
    def _passed(self) -> list[str]:
        return [k for k in self.job.depths.milestones or {} if k not in self.pending]

    @property
    def _wanted(self) -> str:
        """The depths of this run, for a checkpoint."""
        return repr((self.stop, dict(self.job.depths.milestones or {})))

    def _result(
        self,
        scores: Tensor | None,
        indices: Tensor,
        weights: Tensor,
        stopped_by: str,
        epochs: int = 0,
        fraction: float = 1.0,
    ) -> UnlearnResult:
        spent = stopped_by in ("epochs", "max_steps")
        if spent and self.trajectory.records[-1]["step"] != self.step:
            self._record(epochs, weights)
        met = None if spent else self.stop
        kept, own = confirm(self.subject, self.trajectory, met, fraction, self._stretch_to)
        if kept != fraction:
            self.trajectory.records[-1]["step"] = self.step - 1 + kept
        reached = own is not None
        if self.stop is None:
            reached = not self.pending
        return UnlearnResult(
            self.job.model,
            scores,
            indices,
            weights,
            self.trajectory.records,
            self.batch_losses,
            self.step,
            epochs,
            stopped_by,
            kept,
            reached if self.job.depths.rules else None,
        )

    def _stretch_to(self, t: float) -> None:
        if self.stretch is not None:
            move(self.subject, *self.stretch, t)

    def _record(self, epoch: int, weights: Tensor, position: float | None = None) -> None:
        step = self.step if position is None else position
        self.trajectory.record(step, epoch, spread(weights))

    def _move(self, before: dict[str, Tensor], after: dict[str, Tensor], t: float) -> None:
        move(self.subject, before, after, t)
        self.trajectory.moved()

    def _bisect(self, rule: StopRule, before: dict[str, Tensor]) -> float:
        """Shorten the last step to where the rule is just met; returns its fraction kept."""
        after = snapshot(self.subject)

        def reached(t: float) -> bool:
            self._move(before, after, t)
            return rule.reached(self.trajectory) is not None

        fraction = bisect(reached)
        self._move(before, after, fraction)
        self.stretch = before, after
        return fraction

    def _pass_milestones(self, before: dict[str, Tensor], epoch: int, weights: Tensor) -> None:
        """Stop for a moment at every milestone that the last step crossed."""
        stretch = self.stretch
        for name in [k for k, rule in self.pending.items() if rule.reached(self.trajectory)]:
            after, rule = snapshot(self.subject), self.pending.pop(name)
            # Before the first step there is none to bisect.
            fraction = self._bisect(rule, before) if self.step else 1.0
            if self.job.depths.on_milestone is not None:
                position = self.step - 1 + fraction if self.step else 0
                entry = self.trajectory.entry(position, epoch, spread(weights))
                self.subject.finish()
                self.job.depths.on_milestone(name, entry)
            if self.checkpoint is not None:
                self.checkpoint.mark(self._passed)
            self._move(after, after, 1.0)
        self.stretch = stretch

    def _epoch(
        self, epoch: int, indices: Tensor, weights: Tensor, bar: tqdm
    ) -> tuple[str, float] | None:
        """One pass over the selected samples; returns why and where it stopped, if it did."""
        method, size = self.method, self.method.batch_size
        per_batch = method.weights.reweight == "batch"
        pool = self.labelled
        if not per_batch:
            pool, weights = by_index(indices, weights)
        generator = torch.Generator().manual_seed(self.job.seed * 1_000_003 + epoch)
        order = torch.randperm(len(pool), generator=generator)
        losses: list[Tensor] = []
        end: tuple[str, float] | None = None
        batches = order.split(size)
        if not per_batch and self._host_can_wait(len(batches)):
            full = order[: len(order) // size * size].view(-1, size)
            if len(full):
                assert self.steps.sequence is not None
                losses += self.steps.sequence(pool[full], weights[full.to(weights.device)]).unbind()
                self._stepped(len(full), bar)
                batches = batches[len(full) :]
        for chosen in batches:
            drawn = self._batch_weights(pool[chosen]) if per_batch else None
            if per_batch and drawn is None:
                continue
            rows, batch_weights = drawn or (pool[chosen], weights[chosen.to(weights.device)])
            watched = self.stop is not None or bool(self.pending)
            before = snapshot(self.subject) if watched else {}
            losses.append(self.steps.step(rows, batch_weights))
            self._stepped(1, bar)
            if watched:
                self._check_finite(losses[-1:])
                end = self._reached(before, epoch, weights, batch_weights)
                if end is not None:
                    break
            if self._when == "step":
                self._record(epoch, batch_weights)
            if method.max_steps is not None and self.step >= method.max_steps:
                end = ("max_steps", 1.0)
                break
        self._check_finite(losses)
        self.batch_losses += torch.stack(losses).tolist() if losses else []
        if self._when == "epoch" and (end is None or end[0] == "max_steps"):
            self._record(epoch + 1, weights)
        return end

    def _stepped(self, count: int, bar: tqdm) -> None:
        self.trajectory.moved()
        self.step += count
        bar.update(count)

    def _scores(self, rows: Tensor | None) -> Tensor:
        """At the present state; what is not finite there is the ascent's fault, not the data's."""
        weights = self.method.weights
        try:
            source = self.subject if rows is None else self.steps.seen(rows, weights.scored)
            scores = weights.scores(source, rows)
        except InputError as error:
            if self.step:
                raise DivergedError(str(error)) from error
            raise
        assert scores is not None
        return scores

    def _batch_weights(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """The samples of one batch that are selected, and their weights; None: none of them."""
        scores = self._scores(rows)
        try:
            kept, weights = self.method.weights.weigh(scores, self.job.seed + self.step)
        except EmptySelectionError:
            logger.info("step %d skipped: no negative influence in its batch", self.step)
            return None
        return rows[kept.cpu()], weights

    def _reached(
        self, before: dict[str, Tensor], epoch: int, weights: Tensor, batch_weights: Tensor
    ) -> tuple[str, float] | None:
        """Whether the step that went from ``before`` to here ends the run: why, and where."""
        self._pass_milestones(before, epoch, batch_weights)
        reason = self.stop.reached(self.trajectory) if self.stop is not None else None
        if self.stop is not None and reason is not None:
            fraction = self._bisect(self.stop, before)
            self._record(epoch, weights, self.step - 1 + fraction)
            return reason, fraction
        if self.ends_with_milestones and not self.pending:
            self._record(epoch, batch_weights)
            return "milestones", 1.0
        return None

    def _host_can_wait(self, steps: int) -> bool:
        """Whether nothing is measured, recorded or decided between the next steps."""
        if self.steps.sequence is None or self.stop is not None or self.pending:
            return False
        limit = self.method.max_steps
        return self._when != "step" and (limit is None or self.step + steps < limit)

    def _check_finite(self, losses: list[Tensor]) -> None:
        state = self.subject.state().values()
        finite = not losses or is_finite(torch.stack(losses))
        if not finite or not all(map(is_finite, state)):
            raise DivergedError("loss or weights are no longer finite")
