"""Packed ragged tokens: which sample a token belongs to, and how to cut them into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from imu_fast.ops.extension import load

# Tokens whose inputs are converted from half precision at once.
WIDENED_TOKENS = 2048


class Lengths(NamedTuple):
    """The first and the last of some offsets, the fewest and the most tokens of a sample."""

    first: int
    last: int
    fewest: int
    most: int


def lengths(offsets: Tensor) -> Lengths:
    """Of offsets [n+1] of n >= 1 samples; any integers, which need not rise.

    Asked of the same offsets several times a call, so by ``imu_fast._C`` where it is, in one pass.
    """
    offsets = offsets.to(torch.int64)  # differences of unsigned integers do not fall below zero
    found = load() if offsets.is_cpu and offsets.is_contiguous() else None
    if found is not None:
        return Lengths(*found.lengths(offsets.data_ptr(), offsets.shape[0] - 1))
    counts = offsets.diff()
    return Lengths(int(offsets[0]), int(offsets[-1]), int(counts.min()), int(counts.max()))


def is_flat(offsets: Tensor) -> bool:
    """True if every sample has exactly one token (images)."""
    return offsets.shape[0] < 2 or lengths(offsets)[2:] == (1, 1)


def equal_length(offsets: Tensor) -> int:
    """How many tokens each sample has, where all have as many; else 0."""
    if offsets.shape[0] < 2:
        return 0
    _, _, fewest, most = lengths(offsets)
    return most if fewest == most else 0


def sample_of_token(offsets: Tensor, device: torch.device) -> Tensor:
    """The sample index of each token: [N] int64."""
    counts = offsets.diff().to(device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), counts)


def sum_over_tokens(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum token rows [N, ...] into sample rows [n, ...]; a sample without tokens gets zero."""
    if length := equal_length(offsets):
        return values.unflatten(0, (-1, length)).sum(dim=1)
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


def cuts(offsets: Tensor, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive samples ``first:last`` of at most so many tokens, or of one larger sample."""
    first, n = 0, len(offsets) - 1
    while first < n:
        limit = int(offsets[first]) + max_tokens
        last = int(torch.searchsorted(offsets, limit, right=True)) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last


def widened(delta: Tensor, act: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Consecutive samples with act in delta's dtype: all at once where it is, else by chunks.

    delta [N, C], act [N, d] and offsets [n+1] of each; so act of half precision is never there a
    second time as a whole.
    """
    if act.dtype == delta.dtype:
        yield delta, act, offsets
        return
    for first, last in cuts(offsets, WIDENED_TOKENS):
        rows = slice(int(offsets[first]), int(offsets[last]))
        yield delta[rows], act[rows].to(delta.dtype), offsets[first : last + 1] - rows.start


def picked(offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [k+1] and token rows of some samples in the order given; indices [k] on the CPU."""
    counts = offsets.diff()[indices]
    new = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    starts = offsets[:-1][indices]
    rows = torch.arange(int(new[-1])) + torch.repeat_interleave(starts - new[:-1], counts)
    return new, rows
