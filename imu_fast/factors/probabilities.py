"""The curvature of the loss in a head's outputs, which the GGN and its relatives need."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.losses.base import OutputCurvature, mean_scale
from imu_fast.losses.cross_entropy import Softmax


def output_curvature(chunk: GradientFactors) -> OutputCurvature:
    """``B_t`` and ``c_t`` of the chunk's tokens.

    Raises:
        InputError: no loss gave these factors in closed form.
    """
    if chunk.loss is None or chunk.labels is None:
        raise InputError(
            f"factors of layer {chunk.name!r} are not of a softmax head, which the GGN and its "
            "relatives need; capture layers='head', or use 'fisher_diag'"
        )
    scale = mean_scale(chunk.offsets.diff()).to(chunk.device)
    return chunk.loss.output_curvature(chunk.delta, chunk.labels, scale)


def softmax(chunk: GradientFactors) -> Softmax:
    """:func:`output_curvature` where it has to be ``diag(p) - p p^T``.

    Raises:
        InputError: as there, or it is another.
    """
    found = output_curvature(chunk)
    if not isinstance(found, Softmax):
        raise InputError(
            f"factors of layer {chunk.name!r} have loss={chunk.loss!r}; the exact GGN needs "
            "loss='cross_entropy'; use 'ggn_block', 'kfac' or 'ekfac'"
        )
    return found


def probabilities(chunk: GradientFactors) -> tuple[Tensor, Tensor]:
    """Softmax probabilities [N, C] and ``c_t`` [N], both float64; errors as :func:`softmax`."""
    found = softmax(chunk)
    return found.p, found.scale


def augmented(act: Tensor, has_bias: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """``a~ = [act, 1]``: [N, d] to [N, D]."""
    wide = act.to(dtype)
    return torch.cat([wide, torch.ones_like(wide[:, :1])], dim=1) if has_bias else wide
