"""Ascent of the head on cached features: gradients in closed form, several steps at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from imu_fast.ops.head_ascent import head_ascent, head_ascent_gradient
from imu_fast.unlearning.ascent.graph import StepSequence
from imu_fast.unlearning.ascent.head_samples import add_retained, of_samples
from imu_fast.unlearning.ascent.optimizer import plain_sgd
from imu_fast.unlearning.ascent.step import Rule
from imu_fast.unlearning.subject import HeadSubject, Scored


class HeadSteps:
    """Steps of a head.

    Args:
        rows: [C] bool, the classes whose weights may change; None: all.
        preconditioner: [C, D] -> [C, D], applied to the ascent gradient, which keeps its own norm.
    """

    def __init__(
        self,
        subject: HeadSubject,
        rule: Rule,
        *,
        rows: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.subject, self._rule, self._alpha = subject, rule, rule.alpha
        device = subject.theta.device
        # One label a sample, and nothing but these: the formula as it is, fused where it can be.
        self._flat = subject.flat and rule.objective.fused
        self._flat = self._flat and rule.retain is None and rule.samples == "forget"
        self._frozen = None if rows is None else ~rows.to(device)
        self._preconditioner = preconditioner
        self.optimizer = rule.optimizer.make([subject.theta])

    @cached_property
    def sequence(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Several steps at once; on a GPU a graph of them where a step only launches kernels."""
        plain = self._rates() is not None
        if plain and not self.subject.theta.is_cuda:
            return self._several
        return StepSequence(self.step, plain)

    def _rates(self) -> tuple[float, float, float] | None:
        """Those of :func:`plain_sgd`, where the step is that and nothing more."""
        more = (self._preconditioner, self._rule.auxiliary, self._frozen)
        if not self._flat or any(m is not None for m in more):
            return None
        return plain_sgd(self.optimizer)

    def seen(self, rows: Tensor, layers: str) -> Scored:
        """The cached features: what changes is the head, so either way it is the same layer."""
        return self.subject

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        theta, rule = self.subject.theta, self._rule
        rows = rows.to(theta.device)
        if (rates := self._rates()) is not None:
            if len(rows) == len(self.subject.sets["forget"][0]):  # sums in their own order
                return self._sgd(rates, None, torch.empty_like(weights).scatter_(0, rows, weights))
            return self._sgd(rates, rows, weights)
        gradient, loss = self._gradient(rows, weights)
        if self._preconditioner is not None:
            moved = self._preconditioner(gradient).to(gradient)
            scale = gradient.norm() / moved.norm().clamp_min(torch.finfo(moved.dtype).tiny)
            gradient = moved.mul_(scale)
        if rule.retain is not None:
            loss = loss + add_retained(gradient, self.subject, rule.retain, len(rows))
        if self._alpha:
            gradient.add_(theta.sign(), alpha=self._alpha)
            loss = loss + self._alpha * theta.abs().sum()
        theta.grad = gradient
        # Not by a gradient of zero: weight decay and momentum move what has none.
        kept = None if self._frozen is None else theta[self._frozen]
        self.optimizer.step()
        if kept is not None:
            theta[self._frozen] = kept
        return loss

    def _several(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Losses [k] of k steps in order; rows [k, B] of different samples, weights [k, B]."""
        rates, rows = self._rates(), rows.to(self.subject.theta.device)
        if rates is None or rows.shape[1] == len(self.subject.sets["forget"][0]):
            return torch.stack([self.step(r, w) for r, w in zip(rows, weights, strict=True)])
        return self._sgd(rates, rows, weights)

    def _sgd(
        self, rates: tuple[float, float, float], rows: Tensor | None, weights: Tensor
    ) -> Tensor:
        (features, labels), theta = self.subject.sets["forget"], self.subject.theta
        lr, momentum, weight_decay = rates
        # The buffer lives where torch keeps it, so that a checkpoint finds it.
        slots = self.optimizer.state[theta]
        if momentum and "momentum_buffer" not in slots:
            slots["momentum_buffer"] = torch.zeros_like(theta)
        return head_ascent(
            features,
            labels,
            weights,
            theta,
            slots["momentum_buffer"] if momentum else None,
            self.subject.has_bias,
            self._rule.objective.name,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            alpha=self._alpha,
            rows=rows,
        )

    def _gradient(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``- sum_i w_i f_i / sum_i w_i``: [C, D], and that loss."""
        theta, has_bias, rule = self.subject.theta, self.subject.has_bias, self._rule
        if not self._flat:
            return of_samples(self.subject, rule, rows, weights)
        features, labels = self.subject.sets["forget"]
        auxiliary = None if rule.auxiliary is None else rule.auxiliary.of(rows).to(theta.device)
        batch = (features, labels, weights, theta, has_bias, rule.objective.name, auxiliary)
        return head_ascent_gradient(*batch, rows=rows)
