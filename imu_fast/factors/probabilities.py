"""The softmax probabilities behind a head's factors, which the GGN and its relatives need."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors


def probabilities(factors: GradientFactors) -> tuple[Tensor, Tensor]:
    """Softmax probabilities [N, C] and ``c_t`` [N] out of ``delta = c (p - onehot(y))``; float64.

    Normalised again: where a row sums to 1 + 1e-7, ``diag(p) - p p^T`` has a negative eigenvalue,
    and ``S S^T`` (SPEC section 2) is another matrix.

    Raises:
        InputError: the factors are not of a softmax head.
    """
    if factors.labels is None:
        raise InputError(
            f"factors of layer {factors.name!r} are not of a softmax head, which the GGN and its "
            "relatives need; capture layers='head', or use 'fisher_diag'"
        )
    counts = factors.offsets.diff()
    per_token = torch.repeat_interleave(1 / counts.clamp_min(1).double(), counts)
    scale = per_token.to(factors.delta.device)
    p = factors.delta.double() / scale[:, None]
    rows = torch.arange(len(p), device=p.device)
    p.index_put_((rows, factors.labels), p.new_ones(()), accumulate=True).clamp_min_(0)
    return p.div_(p.sum(dim=1, keepdim=True)), scale


def augmented(act: Tensor, has_bias: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """``a~ = [act, 1]``: [N, d] to [N, D]."""
    wide = act.to(dtype)
    return torch.cat([wide, torch.ones_like(wide[:, :1])], dim=1) if has_bias else wide
