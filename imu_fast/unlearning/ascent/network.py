"""Ascent of some parameters of a network, or all, with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.model.guard import modes
from imu_fast.ops.objective import objective
from imu_fast.unlearning.ascent.step import Rule
from imu_fast.unlearning.subject import NetworkSubject


class NetworkSteps:
    """Steps of a network.

    Args:
        batchnorm: ``"train"`` lets running statistics drift on forget data, ``"eval"`` not.
        dropout: mode of every layer that is not a BatchNorm, same values.
    """

    sequence = None

    def __init__(
        self, subject: NetworkSubject, rule: Rule, *, batchnorm: str, dropout: str
    ) -> None:
        self.subject, self._objective, self._alpha = subject, rule.objective, rule.alpha
        self._auxiliary, self._batchnorm, self._dropout = rule.auxiliary, batchnorm, dropout
        self.optimizer = rule.optimizer.make(list(subject.trained.values()))

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        parameters, device = list(self.subject.parameters.values()), self.subject.device
        share = weights.to(device) / weights.sum()
        with modes(self.subject.model, batchnorm=self._batchnorm, dropout=self._dropout):
            with torch.enable_grad():
                terms = []
                for batch, at in self.subject.forget.pieces(rows.tolist()):
                    logits, labels = self.subject.forward(batch)
                    auxiliary = None
                    if self._auxiliary is not None:
                        chosen = rows[at].to(self._auxiliary.device)
                        auxiliary = self._auxiliary[chosen].to(device)
                    values = objective(logits.to(share.dtype), labels, self._objective, auxiliary)
                    terms.append((share[at] * values).sum())
                loss = -torch.stack(terms).sum()
                if self._alpha:
                    penalty = [p.abs().sum() for p in parameters]
                    loss = loss + self._alpha * torch.stack(penalty).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for tensor, gradient in zip(self.subject.trained.values(), gradients, strict=True):
            tensor.grad = None if gradient is None else gradient.to(tensor.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.subject.finish()
        return loss.detach()
