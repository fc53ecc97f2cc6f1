"""What is ascended, step by step: the head on cached features, or the network with autograd.

Both problems offer the same few methods, so that the loop in unlearn.py does not know which it
drives: ``step``, ``measure``, ``factors`` and the tensors that define the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.model.capture import HeadFeatures, capture_features
from imu_fast.model.outputs import Measurement, measure_logits
from imu_fast.ops.head_ascent import head_ascent, head_ascent_gradient, head_logits
from imu_fast.unlearning.ascent.graph import StepSequence
from imu_fast.unlearning.ascent.optimizer import OptimizerFactory, plain_sgd

_EVALUATION_ROWS = 4096


class HeadProblem:
    """Ascent of the classifier alone: features are captured once, gradients are in closed form.

    Args:
        head: the linear layer; written only by :meth:`finish`.
        sets: captured features of "forget", and of every set that is measured.
        auxiliary: [n], what the objective needs to know of each forget sample, or None.
        rows: [C] bool, the classes whose weights may change; None: all.
    """

    def __init__(
        self,
        head: nn.Linear,
        sets: Mapping[str, HeadFeatures],
        make_optimizer: OptimizerFactory,
        *,
        objective: str,
        alpha: float,
        auxiliary: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.head, self.objective, self.alpha = head, objective, alpha
        self.auxiliary = None if auxiliary is None else auxiliary.to(head.weight.device)
        self.frozen = None if rows is None else ~rows.to(head.weight.device)
        # [C, D] -> [C, D], applied to the ascent gradient, which keeps its own norm.
        self.preconditioner: Callable[[Tensor], Tensor] | None = None
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        self.sets = {k: (s.features.to(dtype), s.labels) for k, s in sets.items()}
        self.n = len(self.sets["forget"][1])
        self.has_bias = head.bias is not None
        parts = [head.weight.detach()]
        if self.has_bias:
            parts.append(head.bias.detach()[:, None])
        self.theta = torch.cat(parts, dim=1).to(dtype)
        self.optimizer = make_optimizer([self.theta])

    @cached_property
    def sequence(self) -> StepSequence | None:
        """Several steps at once; a graph of them where a step only launches kernels."""
        return StepSequence(self.step, self.theta.is_cuda and self._rates() is not None)

    def _rates(self) -> tuple[float, float, float] | None:
        """Those of :func:`plain_sgd`, where the step is that and nothing more."""
        more = (self.preconditioner, self.auxiliary, self.frozen)
        return plain_sgd(self.optimizer) if all(m is None for m in more) else None

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        features, labels = self.sets["forget"]
        rows = rows.to(features.device)
        batch = features[rows], labels[rows], weights, self.theta
        if (rates := self._rates()) is not None:
            lr, momentum, weight_decay = rates
            # The buffer lives where torch keeps it, so that a checkpoint finds it.
            slots = self.optimizer.state[self.theta]
            if momentum and "momentum_buffer" not in slots:
                slots["momentum_buffer"] = torch.zeros_like(self.theta)
            buffer = slots["momentum_buffer"] if momentum else None
            return head_ascent(
                *batch,
                buffer,
                self.has_bias,
                self.objective,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                alpha=self.alpha,
            )
        auxiliary = None if self.auxiliary is None else self.auxiliary[rows]
        gradient, loss = head_ascent_gradient(*batch, self.has_bias, self.objective, auxiliary)
        if self.preconditioner is not None:
            moved = self.preconditioner(gradient).to(gradient)
            scale = gradient.norm() / moved.norm().clamp_min(torch.finfo(moved.dtype).tiny)
            gradient = moved.mul_(scale)
        if self.alpha:
            gradient.add_(self.theta.sign(), alpha=self.alpha)
            loss = loss + self.alpha * self.theta.abs().sum()
        self.theta.grad = gradient
        # Not by a gradient of zero: weight decay and momentum move what has none.
        kept = None if self.frozen is None else self.theta[self.frozen]
        self.optimizer.step()
        if kept is not None:
            self.theta[self.frozen] = kept
        return loss

    def measure(self, name: str) -> Measurement:
        features, labels = self.sets[name]
        chunks = zip(features.split(_EVALUATION_ROWS), labels.split(_EVALUATION_ROWS), strict=True)
        return measure_logits((head_logits(x, self.theta, self.has_bias), y) for x, y in chunks)

    def factors(self, rows: Tensor | None = None) -> list[GradientFactors]:
        features, labels = self.sets["forget"]
        if rows is not None:
            rows = rows.to(features.device)
            features, labels = features[rows], labels[rows]
        d = features.shape[1]
        bias = self.theta[:, d] if self.has_bias else None
        return [GradientFactors.from_head(features, self.theta[:, :d], bias, labels)]

    def state(self) -> dict[str, Tensor]:
        return {"theta": self.theta}

    def finish(self) -> None:
        d = self.head.in_features
        with torch.no_grad():
            self.head.weight.copy_(self.theta[:, :d])
            if self.has_bias:
                self.head.bias.copy_(self.theta[:, d])


def head_sets(
    model: nn.Module, head: Any, loaders: Mapping[str, Any], progress: bool
) -> dict[str, HeadFeatures]:
    """Features of every set, one batched pass each; "forget" must have one label per sample.

    Raises:
        InputError: a sample has no label, or several.
    """
    sets = {}
    for name, loader in loaders.items():
        captured = capture_features(model, loader, head, progress=progress)
        counts = captured.offsets.diff()
        if not bool((counts == 1).all()):
            sample = int(torch.nonzero(counts != 1)[0])
            raise InputError(
                f"{name} loader: sample {sample} has {int(counts[sample])} valid labels; "
                "scope='head' needs exactly one per sample, remove it or use scope='layers'"
            )
        sets[name] = captured
    return sets
