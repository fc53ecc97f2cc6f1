"""Influence inside a training step: the weights of one batch, and the loss that they weigh."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.curvature.base import Curvature
from imu_fast.curvature.named import CURVATURES, CurvatureName
from imu_fast.errors import (
    InputError,
    check_choice,
    check_finite_rows,
    check_flag,
    check_fraction,
    check_tensor,
)
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.implicit_head import IMPLICIT_BYTES
from imu_fast.factors.source import Factors
from imu_fast.influence.scores import Layers, ScoreOptions, influence_scores
from imu_fast.influence.weights import QUANTILE_OVER, influence_weights
from imu_fast.losses.base import mean_scale
from imu_fast.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from imu_fast.model.batches import Reread, split_batch
from imu_fast.model.guard import door
from imu_fast.model.head import LinearLayer
from imu_fast.model.verify import deviation, is_known
from imu_fast.ops.objective import LABEL_OBJECTIVES, objective
from imu_fast.ops.tokens import sum_over_tokens

logger = logging.getLogger("imu_fast")

WHERE_EMPTY = ("zeros", "uniform", "error")
OnEmpty = Literal["zeros", "uniform", "error"]


@door
def batch_weights(
    source: nn.Module | Layers,
    batch: Any = None,
    *,
    layers: Any = "head",
    curvature: CurvatureName | Curvature = "fisher_diag",
    damping: float | None = None,
    clip_quantile: float = 0.93,
    quantile_over: str = "kept",
    on_empty: OnEmpty = "zeros",
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """The weight of every sample of one batch, by its influence among them; for a training loop.

    ``w = |influence| ** 0.5`` where the influence is negative, zero elsewhere, clipped. Curvature
    and mean gradient are those of the batch. With a model: one forward pass in evaluation mode (and
    for ``layers`` a backward pass down to them) that leaves its modes, gradients, flags, buffers,
    random states and every graph that is held as they were.

    Args:
        source: the model; or the batch's factors, which cost no pass through it:
            ``imu.GradientFactors.from_head(features, weight, bias, labels)``.
        batch: ``(inputs, labels)``, or a dict with labels, as a loader gives it; with a model.
        layers: whose influence: ``"head"``, a linear layer or several, by name or as modules.
        curvature, damping: as of :func:`imu_fast.influence_scores`.
        clip_quantile, quantile_over: as of :func:`imu_fast.influence_weights`.
        on_empty: where no influence is negative: ``"zeros"``, ``"uniform"`` (ones), ``"error"``.
        options: others of :func:`imu_fast.influence_scores`: of the curvature, and of how the model
            is read.

    Returns:
        [B], without a graph, in the factors' dtype and on their device.

    Raises:
        InputError: as :func:`imu_fast.influence_scores`.
        EmptySelectionError: no influence is negative and ``on_empty="error"``.
    """
    check_choice("on_empty", on_empty, WHERE_EMPTY)
    check_fraction("clip_quantile", clip_quantile)
    check_choice("quantile_over", quantile_over, QUANTILE_OVER)
    data = None
    if isinstance(source, nn.Module):
        if batch is None:
            raise InputError("batch=None: pass the batch after the model")
        parts = split_batch(batch, source)
        data = Reread(lambda: iter([parts]))
    elif batch is not None:
        raise InputError("batch is only used with a model; pass factors alone")
    with _said_once(source):
        scores = influence_scores(
            source, data, curvature=curvature, damping=damping, layers=layers, **options
        )
    return weights_of(scores, clip_quantile, quantile_over, on_empty)


_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def _said_once(source: Any) -> Iterator[None]:
    """What the log says of a model is said at its first batch, not at every step."""
    if not isinstance(source, nn.Module):
        yield
        return
    before = _said.setdefault(source, set())

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in before
        before.add(message)
        return new

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def weights_of(scores: Tensor, clip: float, over: str, on_empty: str) -> Tensor:
    """Dense weights [B] of scores [B]."""
    if on_empty != "error" and not bool((scores < 0).any()):
        return torch.full_like(scores, float(on_empty == "uniform"))
    indices, weights = influence_weights(scores, 1.0, clip, quantile_over=over)
    return torch.zeros_like(scores).index_copy_(0, indices, weights)


class InfluenceWeightedLoss(nn.Module):
    """``- sum_i w_i f_i / sum_i w_i`` of a batch: its weights come from the same forward pass.

    The influence is that at the head, in closed form of its inputs: no second pass, no backward.
    ``f_i`` is the mean of the objective over the sample's valid tokens. Called as
    ``criterion(features, labels)`` it computes the logits, through which the gradient flows into
    features and head; with logits that the model has computed already, these are used.

    Where no influence of a batch is negative, the loss is zero, with a zero gradient.

    Args:
        head: the linear layer that makes the logits; it is not made a part of this module.
        objective: f: ``"ce"``, ``"margin"``, ``"log1mp"``.
        curvature, damping, clip_quantile, quantile_over: as of :func:`batch_weights`.
        ignore_index: labels without a loss. shift: the label at t + 1 belongs to position t, as it
            is where the labels of a causal model are its inputs.

    Attributes:
        weights: [B], of the last call; None before the first.
    """

    weights: Tensor | None

    def __init__(
        self,
        head: nn.Linear,
        *,
        objective: Literal["ce", "margin", "log1mp"] = "ce",
        curvature: CurvatureName | Curvature = "fisher_diag",
        damping: float | None = None,
        clip_quantile: float = 0.93,
        quantile_over: str = "kept",
        ignore_index: int = IGNORE_INDEX,
        shift: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise InputError(f"head is a {type(head).__name__}; pass the nn.Linear of the logits")
        check_choice("objective", objective, LABEL_OBJECTIVES)
        check_choice("quantile_over", quantile_over, QUANTILE_OVER)
        check_fraction("clip_quantile", clip_quantile)
        self.objective, self._clip, self._over = objective, clip_quantile, quantile_over
        self._curvature = CURVATURES.choose(curvature, damping=damping)
        self._loss = CrossEntropy(ignore_index=ignore_index, shift=check_flag("shift", shift))
        # Not registered: its parameters belong to the model.
        object.__setattr__(self, "head", head)
        self.weights, self._known = None, False

    def forward(self, features: Tensor, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            features: the head's inputs, [B, d], or [B, T, d]. labels: [B], or [B, T].
            logits: ``head(features)``; None: computed here.

        Raises:
            InputError: shapes that do not fit, labels out of range, logits that are not what the
                head makes of the features, or a head that makes something else than
                ``act W^T + b`` of them (a cosine, a hook that scales).
        """
        head: nn.Linear = self.head  # type: ignore[assignment]
        loss = self._loss
        check_tensor("features", features, "floating", "[B, d] or [B, T, d]")
        check_tensor("labels", labels, "integer", "[B] or [B, T]")
        if logits is not None:
            check_tensor("logits", logits, "floating", "[B, C] or [B, T, C]")
        if features.shape[-1:] != (head.in_features,):
            raise InputError(
                f"features have shape {tuple(features.shape)}; the head takes [..., "
                f"{head.in_features}]"
            )
        labels = labels.to(torch.int64)
        if features.shape[:-1] != labels.shape or labels.dim() not in (1, 2) or not len(labels):
            raise InputError(
                f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; "
                "expected [B, d] and [B], or [B, T, d] and [B, T]"
            )
        if logits is not None:
            _check_logits(head, features, logits)
        size = len(labels)
        features, targets = loss.aligned(features, labels)
        if logits is not None:
            logits, _ = loss.aligned(logits, labels)
        offsets = torch.arange(size + 1) * (targets.numel() // size)
        rows, of_rows = features.flatten(0, -2), targets.flatten()
        valid = loss.valid(of_rows)
        z = head(rows[valid]) if logits is None else logits.flatten(0, -2)[valid]
        self._check_linear(rows.detach()[valid], z.detach())
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            factors = self._factors(rows, of_rows, offsets, valid, z.detach())
            scores = influence_scores(factors, curvature=self._curvature)
            self.weights = weights_of(scores, self._clip, self._over, "zeros")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        counts = valid.view(size, -1).sum(dim=1)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu()
        f = sum_over_tokens(objective(z, of_rows[valid], self.objective), ends)
        f = f / counts.clamp_min(1)
        weights = self.weights.to(f)
        return -(weights * f).sum() / weights.sum().clamp_min(torch.finfo(f.dtype).tiny)

    def _check_linear(self, rows: Tensor, logits: Tensor) -> None:
        """Raise InputError unless logits [V, C] are ``act W^T + b`` of rows [V, d]; see verify.py.

        All of them at first, and of a layer whose code is not torch's own; then some.
        """
        if not len(rows):
            return
        head: nn.Linear = self.head  # type: ignore[assignment]
        layer, hooks = LinearLayer("head", head), head._forward_hooks or head._forward_pre_hooks
        few = self._known and is_known(layer) and not hooks
        step = max(1, len(rows) // 4) if few else 1
        with torch.no_grad():
            wrong = deviation(layer, rows[::step], logits[::step])
        if wrong:
            raise InputError(
                f"head is a {layer.kind} whose output is not act W^T + b: {wrong}; use "
                "imu_fast.batch_weights(model, batch), which follows the model"
            )
        self._known = True

    def _factors(
        self, rows: Tensor, labels: Tensor, offsets: Tensor, valid: Tensor, logits: Tensor
    ) -> Factors:
        """Those of the head: of the logits that are there, or for half precision of their own.

        Args:
            rows [N, d], labels [N], offsets: of all positions. logits: [V, C], of the valid ones.
        """
        head: nn.Linear = self.head  # type: ignore[assignment]
        own = rows.dtype == logits.dtype in (torch.float32, torch.float64)
        if not own or logits.nbytes >= IMPLICIT_BYTES:
            return GradientFactors.from_head(
                rows, head.weight, head.bias, labels, offsets, ignore_index=self._loss.ignore_index
            )
        loss = replace(self._loss, shift=False)
        labels = loss.prepared(labels, len(head.weight))[valid]
        counts = valid.view(len(offsets) - 1, -1).sum(dim=1).cpu()
        scale = mean_scale(counts).to(logits)
        delta, losses, curvature = loss.residual(logits, labels, scale)
        check_finite_rows("features", act := rows.detach()[valid])
        check_finite_rows("logits", delta)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        losses = sum_over_tokens(losses, ends)
        biased = head.bias is not None
        return GradientFactors(delta, act, ends, biased, labels, losses, "head", loss, curvature)


def _check_logits(head: nn.Linear, features: Tensor, logits: Tensor) -> None:
    """Raise InputError unless some rows of the logits are those of the head."""
    shape = (*features.shape[:-1], head.out_features)
    if tuple(logits.shape) != shape:
        raise InputError(f"logits have shape {tuple(logits.shape)}; expected {shape}")
    with torch.no_grad():
        rows, given = features.flatten(0, -2), logits.flatten(0, -2)
        places = torch.linspace(0, len(rows) - 1, min(len(rows), 4), device=rows.device).long()
        made, given = head(rows[places]).float(), given[places].float()
        eps = torch.finfo(logits.dtype).eps
        if not bool((made - given).abs().max() <= 8 * eps**0.75 * (1 + given.abs().max())):
            raise InputError(
                "logits are not head(features): the model does more after its head, or these are "
                "not its inputs; use imu_fast.batch_weights(model, batch), which follows the model"
            )
