"""Inner products and cosines of per-sample gradients, over several layers as one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.curvature.identity import Identity
from imu_fast.errors import check_choice
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.operands import check_result
from imu_fast.factors.protocol import is_shared
from imu_fast.factors.source import Factors, in_memory
from imu_fast.influence.scores import (
    Layers,
    as_layers,
    check_like,
    factors_of,
    target_vectors,
)
from imu_fast.model.guard import door
from imu_fast.model.reading import ReadingOptions
from imu_fast.ops.bilinear_scores import bilinear_scores, gradient_norms
from imu_fast.ops.gram import Operands, cross_gram
from imu_fast.ops.tokens import sample_of_token

Metric = Literal["cosine", "product"]


def products(source: list[Factors], queries: list[Factors]) -> Tensor:
    """``<g_i, h_j>`` over all layers: [n, m], in the factors' dtype."""
    pairs = zip(source, queries, strict=True)
    return _summed(Identity().fit(layer).pairwise(layer, query) for layer, query in pairs)


def squared_norms(source: list[Factors]) -> Tensor:
    """``||g_i||^2`` over all layers: [n]."""
    return _summed(Identity().fit(layer).self_influence(layer) for layer in source)


@door
def similarity_scores(
    source: Layers | nn.Module,
    data: Any = None,
    *,
    target: Any = None,
    metric: Metric = "cosine",
    layers: Any = "head",
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> Tensor:
    """How much each sample's gradient points along ``v``: ``<g_i, v> / (||g_i|| ||v||)``.

    Positive means the same direction: a step down the sample's loss lowers what ``v`` is the
    gradient of. (Influence has the other sign: ``metric="product"`` is minus
    :func:`imu_fast.influence_scores` under ``curvature="identity"``.)

    Args:
        source: GradientFactors, a list of them (one per layer), or a model, captured over ``data``.
        target: what ``v`` is: None for the samples' mean gradient; factors of a query or validation
            set, whose mean gradient is taken; or a tensor [C, D] (a list with one per layer).
        metric: "cosine", with the norms over all layers together, or "product", ``<g_i, v>``.
        layers: which layers to capture, if a model is given.
        reading: how it is read: ``output``, ``loss``, ``ignore_index``, ``shift``, as of
            :func:`imu_fast.capture_features`.

    Returns:
        [n], in the factors' dtype; in [-1, 1] for the cosine, where a zero gradient has 0.

    Raises:
        InputError: unknown metric; factors, target or data that do not fit.
    """
    check_choice("metric", metric, get_args(Metric))
    all_layers = factors_of(source, data, layers, progress, dict(reading))
    vectors = target_vectors(target, all_layers)
    if metric == "product":
        pairs = zip(all_layers, vectors, strict=True)
        return _summed(layer.each(_along(v)) for layer, v in pairs)
    unit = _Unit(all_layers)
    top = _or_one(torch.stack([v.abs().amax() for v in vectors]).amax())
    vectors = [v / top for v in vectors]
    norm = torch.stack([v.square().sum() for v in vectors]).sum().sqrt()
    found = _summed(map(unit.each, all_layers, map(_along, vectors)))
    check_result("similarity", found, *all_layers)
    return found.div_(_or_one(unit.norms * norm)).clamp_(-1, 1)


@door
def pairwise_similarity(source: Layers, queries: Layers, *, metric: Metric = "cosine") -> Tensor:
    """``<g_i, h_j> / (||g_i|| ||h_j||)`` of every sample against every query: [n, m].

    Positive means the same direction; see :func:`similarity_scores`, also for the arguments.
    ``metric="product"`` is minus :func:`imu_fast.pairwise_influence` under
    ``curvature="identity"``.

    Args:
        source: factors of n samples. queries: of m samples, of the same layers.

    Raises:
        InputError: unknown metric, factors that do not fit.
    """
    check_choice("metric", metric, get_args(Metric))
    all_layers, all_queries = as_layers(source, "source"), as_layers(queries, "queries")
    check_like("queries", all_layers, all_queries)
    all_queries = [in_memory(q, "queries") if is_shared(q) else q for q in all_queries]
    if metric == "product":
        return products(all_layers, all_queries)
    left, right = _Unit(all_layers), _Unit(all_queries)
    pairs = zip(all_layers, all_queries, strict=True)
    found = _summed(
        torch.cat([left.each(layer, _against(chunk)) for chunk in right.chunks(query)], dim=1)
        for layer, query in pairs
    )
    check_result("similarity", found, *all_layers, *all_queries)
    return found.div_(_or_one(left.norms[:, None] * right.norms)).clamp_(-1, 1)


class _Unit:
    """Samples' gradients, each divided by its largest signal at any layer.

    The gradient of a confident sample is 1e-25, whose square is no float32.

    Attributes:
        norms: [n], of what is left of each gradient; zero where it is.
    """

    def __init__(self, layers: list[Factors]) -> None:
        self._tops = _or_one(torch.stack([layer.each(_largest) for layer in layers]).amax(dim=0))
        self.norms = _summed(self.each(layer, _norms) for layer in layers).sqrt_()

    def chunks(self, layer: Factors) -> Iterator[GradientFactors]:
        first = 0
        for chunk in layer.chunks():
            yield self._divided(chunk, first)
            first += chunk.n

    def each(self, layer: Factors, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        if not layer.n_here:  # a process that has none of the samples, and no largest signal of any
            return layer.each(statistic)
        first = 0

        def here(chunk: GradientFactors) -> Tensor:
            nonlocal first
            first += chunk.n
            return statistic(self._divided(chunk, first - chunk.n))

        return layer.each(here)

    def _divided(self, chunk: GradientFactors, first: int) -> GradientFactors:
        tops = self._tops[first : first + chunk.n]
        rows = tops[sample_of_token(chunk.offsets, chunk.device), None]
        return replace(chunk, delta=chunk.delta / rows, labels=None, losses=None, loss=None)


def _summed(parts: Any) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _or_one(x: Tensor) -> Tensor:
    return x.where(x > 0, 1.0)


def _largest(chunk: GradientFactors) -> Tensor:
    """Each sample's largest ``|delta|``: [n]."""
    tops = chunk.delta.abs().amax(dim=1)
    sample = sample_of_token(chunk.offsets, chunk.device)
    return tops.new_zeros(chunk.n).scatter_reduce_(0, sample, tops, "amax")


def _operands(chunk: GradientFactors) -> Operands:
    return chunk.delta, chunk.act, chunk.offsets


def _norms(chunk: GradientFactors) -> Tensor:
    return gradient_norms(*_operands(chunk), chunk.has_bias)


def _along(v: Tensor) -> Callable[[GradientFactors], Tensor]:
    return lambda c: bilinear_scores(c.delta, c.act, v, c.offsets, c.has_bias)


def _against(query: GradientFactors) -> Callable[[GradientFactors], Tensor]:
    return lambda c: cross_gram(_operands(c), _operands(query), c.has_bias)
