"""Scores of a batch at the head from the very forward pass that its step goes on from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imu_fast.errors import check_finite_rows
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.model.capture import capture_features
from imu_fast.model.loss import Targets, counts_of, sample_losses
from imu_fast.ops.tokens import tokens_of_samples
from imu_fast.unlearning.subject import NetworkSubject

logger = logging.getLogger("imu_fast")


@dataclass(frozen=True)
class Forward:
    """One forward pass of forget samples, its graph alive.

    Attributes:
        logits: [..., C]. targets: [...], -1 where there is no label.
        at: which of the batch's rows its samples are.
    """

    logits: Tensor
    targets: Tensor
    at: list[int]


class LiveHead:
    """What a head saw in forward passes that are to be differentiated.

    Its factors cost no forward pass: the residual of the logits that are there, and the head's own
    input.

    Args:
        module: the head, whose output is the logits.
    """

    def __init__(self, subject: NetworkSubject, module: nn.Module) -> None:
        self._subject, self._module = subject, module
        self.forwards: list[Forward] = []
        self.rows = torch.zeros(0, dtype=torch.int64)
        self._acts: list[Tensor] = []

    @classmethod
    def find(cls, subject: NetworkSubject, rows: Tensor) -> LiveHead | None:
        """The head, if nothing stands between it and the logits; by one batch, in full."""
        reading = subject.reading.given()
        found = capture_features(subject.model, subject.forget.subset(rows.tolist()), **reading)
        if len(found.parts) != 1 or found.between or not found.linear:
            logger.info("between the head %r and its logits are %s", found.name, found.between)
            return None
        if found.parts[0][0].derived:
            return None
        return cls(subject, found.parts[0][0].module)

    def run(self, rows: Tensor) -> None:
        """Forward passes of the samples ``rows`` [B]; the caller has set the modes."""
        self.rows, self.forwards, self._acts = rows, [], []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._acts.append(args[0].detach())

        handle = self._module.register_forward_hook(note)
        try:
            with torch.enable_grad():
                for batch, at in self._subject.forget.pieces(rows.tolist()):
                    logits, targets = self._subject.forward(batch)
                    self.forwards.append(Forward(logits, targets, at))
        finally:
            handle.remove()

    def taken(self, rows: Tensor, weights: Tensor) -> tuple[list[Forward], Tensor, Tensor]:
        """The forward passes, once; their samples, and the weights of these, 0 where not in rows.

        Args:
            rows: [k], among those of :meth:`run`, each once. weights: [k].
        """
        forwards, self.forwards, self._acts = self.forwards, [], []
        places = (self.rows[None] == rows.to(self.rows.device)[:, None]).int().argmax(dim=1)
        every = weights.new_zeros(len(self.rows))
        every[places.to(weights.device)] = weights
        return forwards, self.rows, every

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> list[GradientFactors]:
        """Of the samples that :meth:`run` was given, as of :class:`NetworkSubject`.

        Raises:
            InputError: logits are not finite.
        """
        deltas, acts, labels, counts, losses = [], [], [], [], []
        for act, made in zip(self._acts, self.forwards, strict=True):
            valid = made.targets >= 0
            delta, loss, _ = sample_losses(made.logits, Targets.of_classes(made.targets))
            check_finite_rows("logits", delta)
            losses.append(loss)
            deltas.append(delta)
            acts.append(act.reshape(*made.targets.shape, -1)[valid].to(delta.dtype))
            labels.append(made.targets[valid])
            counts.append(counts_of(made.targets))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
        order = torch.tensor([place for made in self.forwards for place in made.at])
        sorted_ = torch.argsort(order)
        tokens, kept = tokens_of_samples(offsets, sorted_)
        tokens = tokens.to(deltas[0].device)
        return [
            GradientFactors(
                torch.cat(deltas)[tokens],
                torch.cat(acts)[tokens],
                torch.cat([kept.new_zeros(1), kept.cumsum(0)]),
                self._module.bias is not None,
                torch.cat(labels)[tokens],
                torch.cat(losses)[sorted_.to(tokens.device)],
                loss=CrossEntropy(),
            )
        ]
