"""Packed ragged tokens: which sample a token belongs to, and how to cut them into pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def is_flat(offsets: Tensor) -> bool:
    """True if every sample has exactly one token (images)."""
    return bool((offsets.diff() == 1).all())


def sample_of_token(offsets: Tensor, device: torch.device) -> Tensor:
    """The sample index of each token: [N] int64."""
    counts = offsets.diff().to(device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), counts)


def sum_over_tokens(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum token rows [N, ...] into sample rows [n, ...]; a sample without tokens gets zero."""
    out = values.new_zeros((len(offsets) - 1, *values.shape[1:]))
    return out.index_add_(0, sample_of_token(offsets, values.device), values)


def tokens_of_samples(offsets: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """``(tokens [N], counts [k])``: where the tokens of some samples [k] are, in their order."""
    starts, counts = offsets[:-1][samples], offsets.diff()[samples]
    ends = counts.cumsum(0)
    shift = torch.repeat_interleave(starts - (ends - counts), counts)
    return shift + torch.arange(len(shift), device=shift.device), counts


def groups_of_equal_length(
    offsets: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples with the same number T > 0 of tokens: ``(samples [g], tokens [g, T])`` per length."""
    lengths, starts = offsets.diff().to(device), offsets[:-1].to(device)
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        samples = torch.nonzero(lengths == length).flatten()
        yield samples, starts[samples, None] + torch.arange(length, device=device)
