"""From influence scores to sample weights: who supports forgetting, and how much."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from imu_fast import distributed
from imu_fast.errors import (
    EmptySelectionError,
    InputError,
    check_choice,
    check_finite_rows,
    check_fraction,
    check_seed,
    check_tensor,
)
from imu_fast.factors.operands import Array, tensor_of

QUANTILE_OVER = ("kept", "all")
# Numbers up to one, and their differences from one, are known to this.
_ROUNDING = Fraction(1, 2**52)


def influence_weights(
    scores: Array,
    top_fraction: float = 1.0,
    clip_quantile: float = 0.93,
    *,
    quantile_over: str = "kept",
    on_empty: str = "error",
    permute: bool = False,
    seed: int = 0,
    group: distributed.Group = None,
) -> tuple[Tensor, Tensor]:
    """Select the samples that support forgetting, and weigh them (IMU, arXiv 2508.01620).

    Keep ``influence < 0``; of these the ``max(1, int(top_fraction * count))`` of largest magnitude;
    ``w = |influence| ** 0.5``, clipped at the ``clip_quantile`` quantile of w (linear
    interpolation). A product that falls short of a whole number by no more than the rounding of a
    fraction is that number: 0.29 of 100 samples are 29, though ``int(0.29 * 100)`` is 28.

    Args:
        scores: [n], floating; an array of numpy or a list will do.
        top_fraction: in (0, 1]. clip_quantile: in (0, 1]; 1 clips nothing.
        quantile_over: the weights whose quantile it is: the ``"kept"`` ones, or ``"all"`` n, zero
            where not kept, as the authors' code for language models (TOFU) has it.
        on_empty: nothing is negative: ``"error"``, or ``"uniform"`` for weights of one on every
            sample, with a warning.
        permute: shuffle the weights among the selected samples (by ``seed``): the random-weights
            control with the same distribution.
        group: of ``torch.distributed``: scores are of this process's samples, [0] where it has
            none, and the selection and the quantile are among those of all.

    Returns:
        indices [k] int64, positions in the scores' order, and weights [k] in the scores' dtype;
        both by descending magnitude of the influence, ties in the scores' order. With ``group``
        the selected ones of this process, by their positions in its scores; there may be none.

    Raises:
        EmptySelectionError: nothing is negative and ``on_empty="error"``.
        InputError: scores not [n] floating and finite, a fraction outside (0, 1], or a quantile
            over all that is zero, so that it would clip every weight to nothing.
    """
    if group is not None:
        return _of_all(
            scores,
            group,
            lambda whole: influence_weights(
                whole,
                top_fraction,
                clip_quantile,
                quantile_over=quantile_over,
                on_empty=on_empty,
                permute=permute,
                seed=seed,
            ),
            f"influence_weights({top_fraction}, {clip_quantile}, {quantile_over!r}, {on_empty!r}, "
            f"permute={permute}, seed={seed})",
        )
    scores = tensor_of("scores", scores)
    check_tensor("scores", scores, "floating", "[n]")
    if scores.dim() != 1 or scores.numel() == 0 or not scores.is_floating_point():
        raise InputError(
            f"scores has shape {tuple(scores.shape)} and dtype {scores.dtype}; pass a floating [n]"
            " with n >= 1"
        )
    check_finite_rows("scores", scores)
    top_fraction = check_fraction("top_fraction", top_fraction)
    clip_quantile = check_fraction("clip_quantile", clip_quantile)
    check_choice("quantile_over", quantile_over, QUANTILE_OVER)
    check_choice("on_empty", on_empty, ("error", "uniform"))
    seed = check_seed("seed", seed)

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
    keep = max(1, math.floor((Fraction(top_fraction) + _ROUNDING) * len(negative)))
    # Stable, so that ties keep the samples' order on every device.
    magnitude, order = torch.sort(-scores[negative], descending=True, stable=True)
    indices, weights = negative[order[:keep]], magnitude[:keep].sqrt()
    count = len(weights) if quantile_over == "kept" else len(scores)
    clip = _quantile(weights, count, clip_quantile)
    if quantile_over == "all" and not bool(clip > 0):
        raise InputError(
            f"clip_quantile={clip_quantile} with quantile_over='all' is zero, since only "
            f"{len(weights)} of {count} samples are kept, and would clip every weight to zero; "
            "pass quantile_over='kept', or clip_quantile=1, which clips nothing"
        )
    weights = weights.clamp_max(clip)
    if permute:
        generator = torch.Generator().manual_seed(seed)
        weights = weights[torch.randperm(len(weights), generator=generator).to(weights.device)]
    return indices, weights


def _of_all(
    given: Array,
    group: distributed.Group,
    select: Callable[[Tensor], tuple[Tensor, Tensor]],
    said: str,
) -> tuple[Tensor, Tensor]:
    """What is selected of all processes' scores, as far as it is of this one's."""
    distributed.check_group(group)
    with distributed.together(said, group):
        scores = tensor_of("scores", given)
        check_tensor("scores", scores, "floating", "[n]")
        if scores.dim() != 1:
            raise InputError(f"scores has shape {tuple(scores.shape)}; pass a floating [n]")
        counts = distributed.gather(len(scores), group)
        first = sum(counts[: distributed.rank_of(group)])
        indices, weights = select(distributed.rows_of_all(scores, group))
        own = (indices >= first) & (indices < first + len(scores))
        return indices[own] - first, weights[own]


def _quantile(descending: Tensor, count: int, q: float) -> Tensor:
    """The q-quantile of these numbers and zeros, ``count`` in all: a scalar tensor.

    By sorting, as numpy defines it: torch.quantile refuses more than 2^24 elements.
    """
    position = q * (count - 1)
    low = int(position)
    zero = descending.new_zeros(())
    below, above = (
        descending[count - 1 - i] if count - 1 - i < len(descending) else zero
        for i in (low, min(low + 1, count - 1))
    )
    return torch.lerp(below, above, position - low)
