"""Ascent of some parameters of a network, or all, with autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.factors.gradient_factors import IGNORE_INDEX, GradientFactors, check_labels
from imu_fast.model.batches import ForgetSet, Parts, as_batches, rereadable, to_device
from imu_fast.model.capture import capture
from imu_fast.model.guard import modes
from imu_fast.model.labels import class_labels
from imu_fast.model.outputs import Measurement, logits_of, measure_logits
from imu_fast.ops.objective import objective
from imu_fast.unlearning.ascent.optimizer import OptimizerFactory


class NetworkProblem:
    """Ascent of some parameters, or all, with autograd.

    Args:
        parameters: names of the trained parameters; every other one stays frozen.
        batchnorm: ``"train"`` lets running statistics drift on forget data, ``"eval"`` not.
        dropout: mode of every layer that is not a BatchNorm, same values.
        score_layers: what :meth:`factors` captures.
        auxiliary: [n], what the objective needs to know of each forget sample, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Mapping[str, Any],
        make_optimizer: OptimizerFactory,
        parameters: Sequence[str],
        *,
        objective: str,
        alpha: float,
        batchnorm: str,
        dropout: str,
        score_layers: Any,
        auxiliary: Tensor | None = None,
    ) -> None:
        self.sequence = None
        self.model, self.objective, self.alpha = model, objective, alpha
        # Measured again and again, which a generator does not bear.
        self.sets = {name: rereadable(data, model) for name, data in sets.items()}
        self.auxiliary = auxiliary
        self.batchnorm, self.dropout, self.score_layers = batchnorm, dropout, score_layers
        self.forget: ForgetSet = sets["forget"]
        self.n = self.forget.n
        chosen = set(parameters)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                self.parameters[name] = parameter
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(list(self.parameters.values()))

    def _forward(self, batch: Parts) -> tuple[Tensor, Tensor]:
        args, kwargs, labels = to_device(batch, self.device)
        logits = logits_of(self.model(*args, **kwargs))
        labels = class_labels(labels, logits.shape)
        check_labels(labels, logits.shape[-1], IGNORE_INDEX)
        return logits, labels

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        share = weights.to(self.device) / weights.sum()
        with modes(self.model, batchnorm=self.batchnorm, dropout=self.dropout):
            with torch.enable_grad():
                terms = []
                for batch, at in self.forget.pieces(rows.tolist()):
                    logits, labels = self._forward(batch)
                    auxiliary = None
                    if self.auxiliary is not None:
                        chosen = rows[at].to(self.auxiliary.device)
                        auxiliary = self.auxiliary[chosen].to(self.device)
                    values = objective(logits.to(share.dtype), labels, self.objective, auxiliary)
                    terms.append((share[at] * values).sum())
                loss = -torch.stack(terms).sum()
                if self.alpha:
                    penalty = [p.abs().sum() for p in self.parameters.values()]
                    loss = loss + self.alpha * torch.stack(penalty).sum()
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def measure(self, name: str) -> Measurement:
        with torch.no_grad(), modes(self.model, batchnorm="eval", dropout="eval"):
            return measure_logits(
                self._forward(batch) for batch in as_batches(self.sets[name], self.model)
            )

    def factors(self, rows: Tensor | None = None) -> list[GradientFactors]:
        data: Any = self.forget if rows is None else self.forget.subset(rows.tolist())
        captured = capture(self.model, data, layers=self.score_layers)
        return [captured] if isinstance(captured, GradientFactors) else captured

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.parameters)
        return tensors | dict(self.model.named_buffers())

    def finish(self) -> None:
        """Nothing to do: the model itself was trained."""
