"""From influence scores to sample weights: SPEC section 4."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from imu_fast.errors import (
    EmptySelectionError,
    InputError,
    check_choice,
    check_finite_rows,
    check_fraction,
)


def influence_weights(
    scores: Tensor,
    top_fraction: float = 1.0,
    clip_quantile: float = 0.93,
    *,
    on_empty: str = "error",
    permute: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Select the samples that support forgetting, and weigh them (authors' classification code).

    Keep ``influence < 0``; of these the ``top_fraction`` with largest magnitude (rounded, at least
    one); ``w = |influence| ** 0.5``, clipped at their ``clip_quantile`` quantile.

    Args:
        scores: [n], floating.
        top_fraction: in (0, 1]. clip_quantile: in (0, 1]; 1 clips nothing.
        on_empty: nothing is negative: ``"error"``, or ``"uniform"`` for weights of one on every
            sample, with a warning.
        permute: shuffle the weights among the selected samples (seeded): the random-weights
            control with the same distribution.

    Returns:
        indices [k] int64, ascending, and weights [k] in the scores' dtype.

    Raises:
        EmptySelectionError: nothing is negative and ``on_empty="error"``.
        InputError: scores not [n] floating and finite, or a fraction outside (0, 1].
    """
    if scores.dim() != 1 or scores.numel() == 0 or not scores.is_floating_point():
        raise InputError(
            f"scores has shape {tuple(scores.shape)} and dtype {scores.dtype}; pass a floating [n]"
            " with n >= 1"
        )
    check_finite_rows("scores", scores)
    check_fraction("top_fraction", top_fraction)
    check_fraction("clip_quantile", clip_quantile)
    check_choice("on_empty", on_empty, ("error", "uniform"))

    negative = torch.nonzero(scores < 0).flatten()
    if len(negative) == 0:
        message = (
            f"none of the {len(scores)} influence scores is negative (smallest "
            f"{float(scores.min()):.3g}): no sample supports the forgetting objective"
        )
        if on_empty == "error":
            raise EmptySelectionError(f"{message}; pass on_empty='uniform' for uniform weights")
        warnings.warn(f"{message}; using uniform weights", stacklevel=2)
        indices = torch.arange(len(scores), device=scores.device)
        return indices, torch.ones_like(scores)
    magnitude = -scores[negative]
    keep = max(1, round(top_fraction * len(negative)))
    if keep < len(negative):
        # Stable, so that ties keep the samples' order on every device.
        largest = torch.sort(magnitude, descending=True, stable=True).indices[:keep]
        chosen = largest.sort().values
        negative, magnitude = negative[chosen], magnitude[chosen]
    weights = magnitude.sqrt()
    # torch.quantile refuses more than 2^24 elements, so numpy's definition by sorting.
    ordered = weights.sort().values
    position = clip_quantile * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    weights = weights.clamp_max(torch.lerp(ordered[low], ordered[high], position - low))
    if permute:
        generator = torch.Generator().manual_seed(seed)
        weights = weights[torch.randperm(len(weights), generator=generator).to(weights.device)]
    return negative, weights
