"""Scores of a batch from the very forward pass that its step goes on from."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_finite_rows
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import Factors, in_memory
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.model.calls import watched
from imu_fast.model.capture import capture_features
from imu_fast.model.convolution import Convolution
from imu_fast.model.head import LinearLayer
from imu_fast.model.live import listening, live_factors
from imu_fast.model.loss import Targets, counts_of, sample_losses
from imu_fast.model.search import directly
from imu_fast.ops.tokens import tokens_of_samples
from imu_fast.unlearning.subject import NetworkSubject, trained_layers

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


class Live(ABC):
    """Forward passes that are to be differentiated, and what their samples' scores are made of.

    Attributes:
        forwards: those of the last :meth:`run`, until they are taken. rows: their samples [B].
    """

    def __init__(self, subject: NetworkSubject) -> None:
        self._subject = subject
        self.forwards: list[Forward] = []
        self.rows = torch.zeros(0, dtype=torch.int64)

    @abstractmethod
    def run(self, rows: Tensor) -> None:
        """Forward passes of the samples ``rows`` [B]; the caller has set the modes."""

    @abstractmethod
    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> Sequence[Factors]:
        """Of the samples that :meth:`run` was given, as of :class:`NetworkSubject`."""

    def taken(self, rows: Tensor, weights: Tensor) -> tuple[list[Forward], Tensor, Tensor]:
        """The forward passes, once; their samples, and the weights of these, 0 where not in rows.

        Args:
            rows: [k], among those of :meth:`run`, each once. weights: [k].
        """
        forwards, self.forwards = self.forwards, []
        places = (self.rows[None] == rows.to(self.rows.device)[:, None]).int().argmax(dim=1)
        every = weights.new_zeros(len(self.rows))
        every[places.to(weights.device)] = weights
        return forwards, self.rows, every

    def _order(self) -> Tensor:
        """Where in the forward passes each of the samples is: [B]."""
        return torch.argsort(torch.tensor([k for made in self.forwards for k in made.at]))


class LiveHead(Live):
    """What a head saw in forward passes that are to be differentiated.

    Its factors cost no forward pass: the residual of the logits that are there, and the head's own
    input.

    Args:
        layer: the head, whose output is the logits.
    """

    def __init__(self, subject: NetworkSubject, layer: LinearLayer) -> None:
        super().__init__(subject)
        self._layer = layer
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
        return cls(subject, found.parts[0][0])

    def run(self, rows: Tensor) -> None:
        """As of :class:`Live`.

        Raises:
            InputError: the logits are not the head's one output, row by row as it made them.
        """
        self.rows, self.forwards, self._acts = rows, [], []
        with torch.enable_grad():
            for batch, at in self._subject.forget.pieces(rows.tolist()):
                with watched([self._layer], leaves=False, stops=True) as seen:
                    logits, targets = self._subject.forward(batch)
                call = directly(seen, logits)
                if call is None:
                    self.forwards = []
                    raise InputError(f"the logits are not the output of {self._layer.name!r} alone")
                self.forwards.append(Forward(logits, targets, at))
                self._acts.append(call.act)

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "head"
    ) -> list[GradientFactors]:
        """As of :class:`Live`.

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
        sorted_ = self._order()
        tokens, kept = tokens_of_samples(offsets, sorted_)
        tokens = tokens.to(deltas[0].device)
        return [
            GradientFactors(
                torch.cat(deltas)[tokens],
                torch.cat(acts)[tokens],
                torch.cat([kept.new_zeros(1), kept.cumsum(0)]),
                self._layer.bias is not None,
                torch.cat(labels)[tokens],
                torch.cat(losses)[sorted_.to(tokens.device)],
                loss=CrossEntropy(),
            )
        ]


class LiveLayers(Live):
    """What layers saw in forward passes that are to be differentiated.

    Their factors cost a backward pass through activations, from the logits to the lowest of them.
    """

    def __init__(self, subject: NetworkSubject, layers: Sequence[LinearLayer]) -> None:
        super().__init__(subject)
        self._layers = list(layers)
        self._factors: list[GradientFactors] = []
        self._ran = set[str]()

    @classmethod
    def find(cls, subject: NetworkSubject) -> LiveLayers | None:
        """The linear layers that are trained, unless a convolution is among what is."""
        layers = trained_layers(subject)
        if not layers or any(isinstance(layer, Convolution) for layer in layers):
            return None
        return cls(subject, layers)

    def run(self, rows: Tensor) -> None:
        """As of :class:`Live`.

        Raises:
            InputError: rows of a layer that belong to several samples, or a call that cannot be
                read; the forward passes are forgotten.
        """
        self.rows, self.forwards, passes = rows, [], []
        with torch.enable_grad():
            for batch, at in self._subject.forget.pieces(rows.tolist()):
                with listening(self._layers) as seen:
                    logits, targets = self._subject.forward(batch)
                self.forwards.append(Forward(logits, targets, at))
                passes.append((seen, logits, Targets.of_classes(targets)))
        try:
            how = self._subject.reading, self._ran
            found = live_factors(self._subject.model, self._layers, passes, *how)
        except InputError:
            self.forwards = []
            raise
        order = self._order()
        given = torch.equal(order, torch.arange(len(order)))
        layers = [in_memory(layer, "a step") for layer in found]
        self._factors = layers if given else [layer.select(order) for layer in layers]

    def factors(
        self, rows: Tensor | None = None, layers: Literal["head", "trained"] = "trained"
    ) -> Sequence[Factors]:
        return self._factors
