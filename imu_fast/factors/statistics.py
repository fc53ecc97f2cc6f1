"""Sums over samples that several rooms need."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.outputs import for_inputs
from imu_fast.factors.probabilities import (
    Outputs,
    augmented,
    pseudo_samples,
    signals_or_curvature,
)
from imu_fast.factors.samples import Means, unchecked_mean_gradient
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import summed
from imu_fast.losses.signals import Signals
from imu_fast.ops.bilinear_scores import gradient_norms
from imu_fast.ops.tokens import lengths


def mean_gradient(source: Factors, *, check: bool = True) -> Tensor:
    """``gbar = 1/n sum_i g_i``: [C, D], in the factors' dtype.

    Args:
        check: raise InputError where it is not finite.
    """
    return Means.mean_gradient(source) if check else unchecked_mean_gradient(source)


def empty_samples(source: Factors) -> list[int]:
    """Samples that are here without a token."""
    if isinstance(source, GradientFactors) and lengths(source.offsets).fewest:
        return []
    counts = for_inputs(source).each(lambda chunk: chunk.offsets.diff())
    found: list[int] = torch.nonzero(counts == 0).flatten().tolist()
    return found


def second_moment(source: Factors) -> Tensor:
    """``S = mean(a~ a~^T)`` over tokens: [D, D], float64."""

    def products(chunk: GradientFactors) -> Tensor:
        a = augmented(chunk.act, chunk.has_bias)
        return a.T @ a

    return for_inputs(source).sums(products) / max(1, source.num_tokens)


def trace(source: Factors, outputs: Outputs = signals_or_curvature) -> float:
    """Of the undamped GGN: ``1/n sum_t tr(B_t) ||a~_t||^2``; of signals ``1/n sum_ik ||g_ik||^2``.

    Args:
        outputs: the curvature of the loss in a chunk's outputs, or its signals.

    Raises:
        InputError: the factors have no curvature of their loss.
    """

    def traces(chunk: GradientFactors) -> Tensor:
        found = outputs(chunk)
        if isinstance(found, Signals):
            return summed(
                gradient_norms(f.delta, f.act, f.offsets, f.has_bias).sum()
                for f in pseudo_samples(chunk, found)
            )
        norms = augmented(chunk.act, chunk.has_bias).square().sum(dim=1)
        return (found.diagonal().sum(dim=1) * norms).sum()

    return float(source.sums(traces)) / source.n


def ggn_diagonal(source: Factors) -> Tensor:
    """Of the undamped GGN: ``1/n sum_t B_t[c, c] a~_t^2``, or ``1/n sum_ik g_ik^2``: [C, D].

    Raises:
        InputError: the factors have no curvature of their loss.
    """

    def products(chunk: GradientFactors) -> Tensor:
        outputs = signals_or_curvature(chunk)
        if isinstance(outputs, Signals):
            parts = (f.fisher_diagonal() for f in pseudo_samples(chunk, outputs))
            return summed(parts).mul_(chunk.n / source.n)
        squares = augmented(chunk.act, chunk.has_bias).square()
        return outputs.diagonal().div_(source.n).T @ squares

    return source.sums(products)
