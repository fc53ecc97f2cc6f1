"""Tokens of a layer of several groups, each of which has a matrix of its own.

A grouped convolution's weight [C, d] is that of its groups, one below the other: C/G outputs each,
that see d inputs of their own. So a position's gradient is the sum of G products, and a sample's
gradient may be said by ``tokens = [delta, act]`` of the whole matrix in two ways, of which the one
with fewer tokens is the cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.ops.tokens import equal_length, groups_of_equal_length, sum_over_tokens

# A column's token has the column times 1/_SCALE as its signal, which the bias sees too: a power of
# two, so that nothing is rounded, and so large that what the bias's own token takes back is small.
_SCALE = 1024.0

Tokens = tuple[Tensor, Tensor, Tensor]
"""delta [N, C], act [N, d] and offsets [n+1]."""


def by_group(delta: Tensor, act: Tensor, offsets: Tensor, groups: int) -> Tokens:
    """A token for each position and group, whose signal is zero at the outputs of the others.

    Args:
        delta: [P, C]. act: [P, G * d], what each group sees. offsets: [n+1].
    """
    own = delta.unflatten(1, (groups, -1))
    spread = own.new_zeros(len(own), groups, *own.shape[1:])
    spread.diagonal(dim1=1, dim2=2).copy_(own.movedim(1, -1))
    inputs = act.unflatten(1, (groups, -1))
    return spread.flatten(2).flatten(0, 1), inputs.flatten(0, 1), offsets * groups


def by_column(delta: Tensor, act: Tensor, offsets: Tensor, groups: int, has_bias: bool) -> Tokens:
    """A token for each column of a sample's gradient [C, D]; none for samples without positions.

    Args:
        delta: [P, C]. act: [P, G * d], what each group sees. offsets: [n+1].
        has_bias: whether D = d + 1.
    """
    columns = gradients_of_groups(delta, act, offsets, groups).transpose(1, 2)
    d = columns.shape[1]
    inputs = torch.eye(d, dtype=delta.dtype, device=delta.device)
    if has_bias:
        columns = columns / _SCALE
        rest = sum_over_tokens(delta, offsets) - columns.sum(dim=1)
        columns = torch.cat([columns, rest[:, None]], dim=1)
        inputs = torch.cat([inputs * _SCALE, inputs.new_zeros(1, d)])
    some = offsets.diff() > 0
    if not bool(some.all()):
        columns = columns[some.to(columns.device)]
    counts = some.long() * len(inputs)
    return (
        columns.flatten(0, 1),
        inputs.expand(len(columns), -1, -1).flatten(0, 1),
        torch.cat([offsets.new_zeros(1), counts.cumsum(0)]),
    )


def gradients_of_groups(delta: Tensor, act: Tensor, offsets: Tensor, groups: int) -> Tensor:
    """The weight's gradients of n samples: [n, C, d]."""
    act = act.to(delta.dtype)
    left, right = delta.unflatten(1, (groups, -1)), act.unflatten(1, (groups, -1))
    if length := equal_length(offsets):
        left, right = left.unflatten(0, (-1, length)), right.unflatten(0, (-1, length))
        return torch.einsum("ntgc,ntgd->ngcd", left, right).flatten(1, 2)
    out = delta.new_zeros(len(offsets) - 1, *left.shape[1:], right.shape[-1])
    for samples, tokens in groups_of_equal_length(offsets, delta.device):
        out[samples] = torch.einsum("ntgc,ntgd->ngcd", left[tokens], right[tokens])
    return out.flatten(1, 2)
