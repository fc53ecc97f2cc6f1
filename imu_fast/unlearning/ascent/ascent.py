"""The ascent loop over a problem: epochs, weights, records, depths, checkpoints (SPEC 5)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import EmptySelectionError, InputError
from imu_fast.influence.scores import influence_scores
from imu_fast.influence.weights import influence_weights
from imu_fast.model.outputs import Measurement
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.unlearning.depth import BISECTIONS, OnMilestone, StopRule
from imu_fast.unlearning.result import DivergedError, UnlearnResult
from imu_fast.unlearning.subject import Problem

logger = logging.getLogger("imu_fast")


class Run:
    """The ascent loop: epochs, weights, records, depths, checkpoints.

    Args:
        weights: how samples are weighed, see imu_fast.methods.base.
        milestones: depths on the way, by name; passing one (its step bisected, as a stop's) calls
            ``on_milestone(name, record)`` with the model at that depth, then ascent goes on from
            where it was. Without a stop rule the last one ends the run.
    """

    def __init__(
        self,
        problem: Problem,
        settings: dict[str, Any],
        weights: str,
        stop: StopRule | None,
        milestones: Mapping[str, StopRule],
        on_milestone: OnMilestone | None,
        watch: list[str],
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.problem, self.settings, self.weights = problem, settings, weights
        self.stop, self.watch = stop, watch
        self.pending, self.on_milestone = dict(milestones), on_milestone
        self.ends_with_milestones = bool(milestones) and stop is None
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.resume, self.progress = resume, progress
        self.trajectory: list[dict[str, float]] = []
        self.batch_losses: list[float] = []
        self.step = 0
        self._measured: dict[str, Measurement] = {}

    def measure(self, name: str) -> Measurement:
        """The problem's measurement at the current state, made once.

        Raises:
            DivergedError: finite weights may still give logits that are not.
        """
        if name not in self._measured:
            measured = self.problem.measure(name)
            if not bool(torch.isfinite(measured.loss).all()):
                raise self._diverged()
            self._measured[name] = measured
        return self._measured[name]

    def _diverged(self) -> DivergedError:
        return DivergedError(
            f"the ascent diverged by step {self.step} with lr={self.settings['lr']}; lower lr, "
            "stop earlier, or use a bounded objective ('margin')"
        )

    def _scores(self, rows: Tensor | None = None) -> Tensor:
        s = self.settings
        factors = self.problem.factors(rows)
        if self.weights == "loss":
            losses = factors[0].losses
            assert losses is not None
            return -losses
        has = CURVATURES[s["curvature"]].paths()
        own = {name: s[name] for name in ("damping", "damping_mode") if name in has}
        spec = CURVATURES.choose(s["curvature"], **own)
        return influence_scores(factors, curvature=spec, first_row_is_mean=s["first_row_is_mean"])

    def _weigh(self, scores: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        s = self.settings
        return influence_weights(
            scores,
            s["top_fraction"],
            s["clip_quantile"],
            on_empty=s["on_empty"],
            permute=self.weights == "permuted",
            seed=s["seed"] + epoch,
        )

    def _entry(
        self, epoch: int, weights: Tensor, position: float | None = None
    ) -> dict[str, float]:
        forget = self.measure("forget")
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
            measured = self.measure(name)
            entry[f"{name}_loss"] = measured.mean_loss
            entry[f"{name}_accuracy"] = measured.accuracy
        return entry

    def _record(self, epoch: int, weights: Tensor, position: float | None = None) -> None:
        self.trajectory.append(self._entry(epoch, weights, position))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.problem.state().items()}

    def _move_to(self, before: dict[str, Tensor], after: dict[str, Tensor], t: float) -> None:
        """Set the state to ``before + t (after - before)``; integer buffers take ``after``."""
        self._measured.clear()
        with torch.no_grad():
            for name, tensor in self.problem.state().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.lerp(before[name], after[name], t))
                else:
                    tensor.copy_(after[name])

    def _bisect(self, rule: StopRule, before: dict[str, Tensor]) -> float:
        """Shorten the last step to where the rule is just met; returns its fraction kept."""
        after, low, high = self._snapshot(), 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            self._move_to(before, after, middle)
            if rule.reached(self):
                high = middle
            else:
                low = middle
        self._move_to(before, after, high)
        return high

    def _pass_milestones(self, before: dict[str, Tensor], epoch: int, weights: Tensor) -> None:
        """Stop for a moment at every milestone that the last step crossed."""
        for name in [name for name, rule in self.pending.items() if rule.reached(self)]:
            after = self._snapshot()
            fraction = self._bisect(self.pending.pop(name), before)
            self._at_milestone(name, self._entry(epoch, weights, self.step - 1 + fraction))
            self._move_to(after, after, 1.0)

    def _at_milestone(self, name: str, entry: dict[str, float]) -> None:
        if self.on_milestone is not None:
            self.problem.finish()
            self.on_milestone(name, entry)

    def ascend(self, model: nn.Module) -> UnlearnResult:
        """Run to the end of the budget or to the stop rule."""
        s, problem = self.settings, self.problem
        scored = self.weights != "uniform"
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
        if first_epoch == 0:
            here = self._snapshot() if self.pending else {}
            self._pass_milestones(here, 0, weights)
            already = self.stop.reached(self) if self.stop is not None else None
            if self.ends_with_milestones and not self.pending:
                already = "milestones"
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
        per_batch = s["reweight"] == "batch" and self.weights != "uniform"
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
                self._measured.clear()
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
            watched = self.stop is not None or bool(self.pending)
            before = self._snapshot() if watched else {}
            losses.append(problem.step(rows, batch_weights))
            self._measured.clear()
            self.step += 1
            bar.update()
            if watched:
                self._check_finite(losses[-1:])
                self._pass_milestones(before, epoch, batch_weights)
                reason = self.stop.reached(self) if self.stop is not None else None
                if self.stop is not None and reason is not None:
                    fraction = self._bisect(self.stop, before)
                    end = (reason, fraction)
                    self._record(epoch, weights, self.step - 1 + fraction)
                    break
                if self.ends_with_milestones and not self.pending:
                    self._record(epoch, batch_weights)
                    end = ("milestones", 1.0)
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
        if self.problem.sequence is None or self.stop is not None or self.pending:
            return False
        limit = self.settings["max_steps"]
        return self.settings["record"] == "epoch" and (limit is None or self.step + steps < limit)

    def _check_finite(self, losses: list[Tensor]) -> None:
        state = self.problem.state().values()
        finite = not losses or bool(torch.isfinite(torch.stack(losses)).all())
        if not finite or not all(bool(torch.isfinite(t).all()) for t in state):
            raise self._diverged()

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
