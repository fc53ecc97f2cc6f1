"""Ascent of some parameters of a network, or all, with autograd."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.model.guard import modes
from imu_fast.model.loss import counts_of
from imu_fast.model.parts import Parts
from imu_fast.ops.objective import objective
from imu_fast.ops.tokens import sum_over_tokens
from imu_fast.unlearning.ascent.head_samples import drawn, shares
from imu_fast.unlearning.ascent.live import Forward, Live, LiveHead, LiveLayers
from imu_fast.unlearning.ascent.retain import RETAIN, Retain
from imu_fast.unlearning.ascent.step import Rule
from imu_fast.unlearning.subject import NetworkSubject, Scored

logger = logging.getLogger("imu_fast")


class NetworkSteps:
    """Steps of a network.

    Args:
        batchnorm: ``"train"`` lets running statistics drift on forget data, ``"eval"`` not.
        dropout: mode of every layer that is not a BatchNorm, same values.
        original: what is trained, and the buffers, as they were, by name; for a divergence from
            that model, which is in evaluation mode.
    """

    sequence = None

    def __init__(
        self,
        subject: NetworkSubject,
        rule: Rule,
        *,
        batchnorm: str,
        dropout: str,
        original: Mapping[str, Tensor],
    ) -> None:
        self.subject, self._rule, self._original = subject, rule, dict(original)
        self._batchnorm, self._dropout = batchnorm, dropout
        # Scores are of evaluation mode, and of the forget set.
        self._may_live = batchnorm == dropout == "eval" and rule.samples == "forget"
        self._live: Live | None = None
        self.optimizer = rule.optimizer.make(list(subject.trained.values()))

    def seen(self, rows: Tensor, layers: str) -> Scored:
        """What the weights of a step on samples of ``rows`` are made of.

        They come from the step's own forward pass, which then goes on from there.
        """
        if not self._may_live:
            return self.subject
        if self._live is None:
            head = layers == "head"
            found = LiveHead.find(self.subject, rows) if head else LiveLayers.find(self.subject)
            self._live, self._may_live = found, found is not None
        if self._live is None:
            return self.subject
        try:
            with modes(self.subject.model, batchnorm="eval", dropout="eval"):
                self._live.run(rows)
        except InputError as error:  # a capture knows more ways, or says what is wrong
            logger.info("scores come from a forward pass of their own: %s", error)
            self._live, self._may_live = None, False
            return self.subject
        return self._live

    def step(self, rows: Tensor, weights: Tensor) -> Tensor:
        parameters, rule = list(self.subject.parameters.values()), self._rule
        with modes(self.subject.model, batchnorm=self._batchnorm, dropout=self._dropout):
            with torch.enable_grad():
                loss = self._ascent(rows, weights)
                if not loss.requires_grad:
                    raise self._unreached()
                if rule.retain is not None:
                    loss = loss + self._retained(rule.retain, len(rows))
                if rule.alpha:
                    penalty = [p.abs().sum() for p in parameters]
                    loss = loss + rule.alpha * torch.stack(penalty).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for tensor, gradient in zip(self.subject.trained.values(), gradients, strict=True):
            tensor.grad = None if gradient is None else gradient.to(tensor.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.subject.finish()
        return loss.detach()

    def _unreached(self) -> InputError:
        names = list(self.subject.parameters)
        return InputError(
            f"the {len(names)} parameters to be trained (first: {names[0]!r}) have no part in what "
            "the model computes, as adapters that are merged or disabled have none: unmerge them "
            "(unmerge_adapter() of a peft model), set requires_grad on others, or name layers=[...]"
        )

    def _forwards(self, rows: Tensor) -> Iterator[Forward]:
        for batch, at in self.subject.sets[self._rule.samples].pieces(rows.tolist()):
            yield Forward(*self.subject.forward(batch), at)

    def _ascent(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``- sum_i w_i f_i / sum_i w_i``."""
        goal, known, device = self._rule.objective, self._rule.auxiliary, self.subject.device
        weights = weights.to(device)
        forwards: Iterable[Forward] = self._forwards(rows)
        if self._live is not None and self._live.forwards:
            forwards, rows, weights = self._live.taken(rows, weights)
        f, tokens, order = [], [], []
        for made in forwards:
            found = None if known is None else known.of(rows[made.at]).to(device)
            z, y, counts = _labelled(made.logits, made.targets, weights.dtype)
            values = objective(z, y, goal.rows, found if goal.of_tokens else None)
            mean = _means(values, counts)
            f.append(goal.of_samples(mean, counts.to(mean), None if goal.of_tokens else found))
            tokens.append(counts)
            order += made.at
        share = shares(weights[torch.tensor(order, device=device)], torch.cat(tokens))
        used = share > 0
        return -(share[used] * torch.cat(f)[used]).sum()

    def _retained(self, retain: Retain, size: int) -> Tensor:
        """``retain_weight`` times the mean loss of ``size`` retain samples."""
        data = self.subject.sets[RETAIN]
        losses, tokens = [], []
        for batch, _ in data.pieces(drawn(data.n, size).tolist()):
            logits, targets = self.subject.forward(batch)
            z, y, counts = _labelled(logits, targets, torch.float32)
            if retain.retain_loss == "ce":
                values = objective(z, y, "ce", None)
            else:
                with torch.no_grad():
                    was, _ = self._as_it_was(batch)
                    log_was = _labelled(was, targets, torch.float32)[0].log_softmax(dim=1)
                divergence = log_was.exp() * (log_was - z.log_softmax(dim=1))
                values = divergence.sum(dim=1)
            losses.append(_means(values, counts))
            tokens.append(counts)
        counts = torch.cat(tokens)
        values = torch.cat(losses)
        share = shares(torch.ones_like(values), counts)
        return retain.retain_weight * (share * values).sum()

    def _as_it_was(self, batch: Parts) -> tuple[Tensor, Tensor]:
        """Logits and labels of the model before the first step; no statistics move."""
        with modes(self.subject.model, batchnorm="eval", dropout="eval"):
            return self.subject.forward(batch, self._original)


def _labelled(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, C] that have a label, in dtype or float64, these labels, and counts [n]."""
    valid = targets >= 0
    wide = torch.float64 if logits.dtype == torch.float64 else dtype
    counts = counts_of(targets).to(logits.device)
    if targets.dim() == 1 and bool(valid.all()):
        return logits.to(wide), targets, counts
    return logits[valid].to(wide), targets[valid], counts


def _means(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of each sample's tokens [N]: [n]."""
    if len(values) == len(counts) and bool((counts == 1).all()):
        return values
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return sum_over_tokens(values, offsets) / counts.clamp_min(1).to(values)
