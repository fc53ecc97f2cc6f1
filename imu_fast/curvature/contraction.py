"""Scores ``<g_i, X>`` of a solved X: in the factors' dtype, and in float64 where they cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.operands import check_result
from imu_fast.factors.outputs import sum_of_outputs
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import joined
from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.ops.tokens import sum_over_tokens

# Elements of factors that are widened to float64 at a time, where they are not kept so: two
# pieces of 4 MB live; a GPU needs more to be filled.
_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26
# Of scores, relative to their norm: the error that rounding may leave.
_ERROR = 1e-5

Seen = Callable[[GradientFactors], None]
Contract = Callable[[Factors, Tensor, Seen], Tensor]
"""Factors, and X of their dtype or float64: ``<g_i, X>`` in that precision, in their dtype. Each
chunk is shown as it is read: another pass over the samples may be one through the model."""


def in_float64(factors: GradientFactors) -> Iterator[GradientFactors]:
    """The samples in float64: all at once where they are that, else some at a time."""
    if factors.dtype == torch.float64:
        yield factors
        return
    elements = _ELEMENTS if factors.device.type == "cpu" else _GPU_ELEMENTS
    for piece in factors.chunks(max(1, elements // (factors.num_classes + factors.feature_dim))):
        delta, act = piece.delta.double(), piece.act.double()
        yield GradientFactors(delta, act, piece.offsets, piece.has_bias)


def contracted(factors: Factors, x: Tensor, seen: Seen) -> Tensor:
    """``<g_i, X>`` of every sample that is here: [n], or [n, m] for x [m, C, D]; x's precision."""

    def term(part: Factors, classes: slice) -> Tensor:
        rows = x[..., classes, :]

        def of_chunk(chunk: GradientFactors) -> Tensor:
            seen(chunk)
            pieces = [chunk] if rows.dtype == chunk.dtype else in_float64(chunk)
            found = [
                bilinear_scores(piece.delta, piece.act, rows, piece.offsets, piece.has_bias)
                for piece in pieces
            ]
            return joined(found).to(chunk.dtype)

        return part.each(of_chunk)

    return sum_of_outputs(factors, term)


def scores(factors: Factors, x: Tensor, contract: Contract = contracted) -> Tensor:
    """``<g_i, X>`` of every sample that is here: [n], or [n, m] for x [m, C, D].

    X in float64, as it is solved for, is rounded to the factors' dtype first. A small damping makes
    it large where the gradients have no part, and rounding that may be all of the scores: such X
    are multiplied again in float64, as they are.

    Raises:
        InputError: scores beyond the range of the factors' dtype.
    """
    squares: list[Tensor] = []
    exact = x.dtype == factors.dtype or x.dtype != torch.float64

    def measure(chunk: GradientFactors) -> None:
        if not exact:
            squares.append(_sizes(chunk).double().square().sum())

    found = contract(factors, x.to(factors.dtype), measure)
    if squares:
        many = x.view(-1, *x.shape[-2:])
        rows = found.view(len(found), len(many))
        # Of each X, whether rounding may have changed its scores by more than is allowed.
        rounding = torch.finfo(factors.dtype).eps * torch.stack(squares).sum().sqrt()
        sizes = many.flatten(1).norm(dim=1), rows.double().norm(dim=0)
        lost = torch.nonzero(rounding * sizes[0] > _ERROR * sizes[1]).flatten()
        if len(lost):
            rows[:, lost] = contract(factors, many[lost], lambda _: None)
    return check_result("influence", found, factors)


def _sizes(chunk: GradientFactors) -> Tensor:
    """At least ``||g_i||``, of every sample: the sum of its tokens'."""
    act = torch.linalg.vector_norm(chunk.act, dim=1, dtype=chunk.dtype)
    if chunk.has_bias:
        act = torch.hypot(act, act.new_ones(()))
    return sum_over_tokens((chunk.delta.norm(dim=1) * act)[:, None], chunk.offsets)
