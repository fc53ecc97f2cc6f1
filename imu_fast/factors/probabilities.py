"""The curvature of the loss in a layer's outputs, which the GGN and its relatives need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.losses.base import mean_scale
from imu_fast.losses.output_curvature import OutputCurvature, Softmax, StoredCurvature
from imu_fast.losses.signals import Signals

# The curvature of the loss in a chunk's outputs, or an inner layer's signals.
Outputs = Callable[[GradientFactors], OutputCurvature | Signals]


def token_scale(chunk: GradientFactors) -> Tensor:
    """``c_t = 1/T_i`` of the chunk's tokens: [N], float64."""
    return mean_scale(chunk.offsets.diff()).to(chunk.device)


class NoCurvatureError(InputError):
    """Nothing says what the second derivatives of the loss in a layer's outputs are."""


def output_curvature(chunk: GradientFactors) -> OutputCurvature:
    """``B_t`` of the chunk's tokens, in float64; ``c_t`` is in it.

    Raises:
        NoCurvatureError: no loss gave these factors in closed form, and no curvature came along.
    """
    scale, kept = token_scale(chunk), chunk.curvature
    if kept is None and chunk.loss is not None and chunk.labels is not None:
        kept = chunk.loss.recovered(chunk.delta.double() / scale[:, None], chunk.labels)
    if not isinstance(kept, StoredCurvature):
        raise NoCurvatureError(
            f"factors of layer {chunk.name!r} have no curvature of the loss in their outputs, "
            "which the GGN and its relatives need; capture the layer with fisher='sampled' or "
            "'exact' (or layers='head'), pass curvature= with delta, or use fisher='empirical' or "
            "'fisher_diag'"
        )
    try:
        return kept.resolved(chunk.delta, chunk.labels, scale)
    except InputError as error:  # of an inner layer
        raise InputError(f"factors of layer {chunk.name!r}: {error}") from error


def signals_or_curvature(chunk: GradientFactors) -> OutputCurvature | Signals:
    """Signals of an inner layer, or :func:`output_curvature`, whose errors it has."""
    kept = chunk.curvature
    return kept if isinstance(kept, Signals) else output_curvature(chunk)


def pseudo_samples(chunk: GradientFactors, signals: Signals) -> Iterator[GradientFactors]:
    """The chunk's samples with each signal as their delta, in float64: ``g_ik`` for every k."""
    wide = chunk.act.double()
    for delta in signals.columns(torch.float64):
        yield GradientFactors(delta, wide, chunk.offsets, chunk.has_bias, name=chunk.name)


def softmax(chunk: GradientFactors) -> Softmax:
    """:func:`output_curvature` where it has to be ``diag(p) - p p^T``.

    Raises:
        InputError: as there, or it is another.
    """
    found = output_curvature(chunk)
    if not isinstance(found, Softmax):
        raise InputError(
            f"factors of layer {chunk.name!r} have loss={chunk.loss!r}; probabilities of classes "
            "need loss='cross_entropy'"
        )
    return found


def probabilities(chunk: GradientFactors) -> tuple[Tensor, Tensor]:
    """Softmax probabilities [N, C] and what weighs each token's ``diag(p) - p p^T`` [N].

    Both float64; errors as :func:`softmax`.
    """
    found = softmax(chunk)
    return found.p, found.weight


def augmented(act: Tensor, has_bias: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """``a~ = [act, 1]``: [N, d] to [N, D]."""
    wide = act.to(dtype)
    return torch.cat([wide, torch.ones_like(wide[:, :1])], dim=1) if has_bias else wide
