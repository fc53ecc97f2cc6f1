"""Influence of forget samples at the classifier: SPEC section 3."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.curvature import named as curvature_module
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.model.guard import door
from imu_fast.ops.bilinear_scores import bilinear_scores

logger = logging.getLogger("imu_fast")

Factors = GradientFactors | Sequence[GradientFactors]


def _as_layers(value: Any, name: str) -> list[GradientFactors]:
    layers = [value] if isinstance(value, GradientFactors) else list(value)
    if not layers or not all(isinstance(layer, GradientFactors) for layer in layers):
        raise InputError(
            f"{name} must be GradientFactors, or a list of them (one per layer); got "
            f"{type(value).__name__}. Build them with imu_fast.capture(model, loader)"
        )
    if len({layer.n for layer in layers}) > 1:
        raise InputError(f"{name}: layers disagree on n: {[layer.n for layer in layers]}")
    return layers


def _factors_of(source: Any, loader: Any, layers: Any, progress: bool) -> list[GradientFactors]:
    if isinstance(source, nn.Module):
        if loader is None:
            raise InputError("loader=None: pass the forget loader after the model")
        from imu_fast.model.capture import capture

        source = capture(source, loader, layers=layers, progress=progress)
    elif loader is not None:
        raise InputError("loader is only used with a model; pass factors alone")
    return _as_layers(source, "factors")


def _check_like(name: str, layers: list[GradientFactors], others: list[GradientFactors]) -> None:
    shapes = [(x.num_classes, x.width, x.delta.device, x.delta.dtype) for x in layers]
    other_shapes = [(x.num_classes, x.width, x.delta.device, x.delta.dtype) for x in others]
    if shapes != other_shapes:
        raise InputError(
            f"{name} has layers (C, D, device, dtype) {other_shapes}, factors have {shapes}; "
            "capture both from the same model and layers"
        )


def _target_vectors(target: Any, layers: list[GradientFactors]) -> list[Tensor]:
    """``v`` of each layer: the mean forget gradient, another set's mean, or given."""
    if target is None:
        return [layer.mean_gradient() for layer in layers]
    many = isinstance(target, Sequence)
    if isinstance(target, Tensor) or (many and target and isinstance(target[0], Tensor)):
        vectors = [target] if isinstance(target, Tensor) else list(target)
        shapes = [(layer.num_classes, layer.width) for layer in layers]
        if [tuple(v.shape) for v in vectors] != shapes:
            raise InputError(
                f"target has shapes {[tuple(v.shape) for v in vectors]}; expected one [C, D] per "
                f"layer: {shapes}"
            )
        for v in vectors:
            if not bool(torch.isfinite(v).all()):
                raise InputError("target is not finite; remove the NaN or infinite entries")
        return [v.to(layer.delta) for v, layer in zip(vectors, layers, strict=True)]
    others = _as_layers(target, "target")
    _check_like("target", layers, others)
    return [other.mean_gradient() for other in others]


@door
def influence_scores(
    factors: Factors | nn.Module,
    loader: Any = None,
    *,
    curvature: str = "fisher_diag",
    damping: float = 1e-2,
    target: Any = None,
    first_row_is_mean: bool = False,
    layers: Any = "head",
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """``influence_i = - g_i^T M^-1 v`` for every forget sample (SPEC section 3; IMU eq. of scores).

    Negative means that the sample pulls with the mean forget direction.

    Args:
        factors: GradientFactors, a list of them (one per layer: scores add up, ``M`` is block
            diagonal over layers), or a model, captured over ``loader`` in one batched pass.
        curvature: a name out of :func:`imu_fast.curvatures`.
        damping: lam > 0, in units of squared gradients.
        target: what ``v`` is: None for the mean forget gradient; factors of a query or validation
            set, whose mean gradient is taken; or a tensor [C, D] (a list with one per layer).
        first_row_is_mean: reproduce a defect of the authors' published code, whose in-place sum
            overwrites sample 0's gradient with the mean: its score becomes ``-gbar^T M^-1 gbar``.
        layers: which layers to capture, if a model is given.
        options: of the curvature, such as ``damping_mode="clamp"``.

    Returns:
        [n], in the factors' dtype and on their device.

    Raises:
        InputError: as SPEC section 8 lists.
    """
    all_layers = _factors_of(factors, loader, layers, progress)
    vectors = _target_vectors(target, all_layers)
    scores: Tensor | None = None
    first = 0.0
    for layer, v in zip(all_layers, vectors, strict=True):
        fitted = curvature_module.fit(curvature, layer, damping, **options)
        # In place where v is ours: fresh memory of size C x D costs as much as the division.
        x = fitted.solve(v, out=None if target is not None else v)
        x = x.to(layer.delta)
        part = bilinear_scores(layer.delta, layer.act, x, layer.offsets, layer.has_bias).neg_()
        scores = part if scores is None else scores + part
        if first_row_is_mean:
            first -= float((layer.mean_gradient() * x).sum())
    assert scores is not None
    if first_row_is_mean:
        scores[0] = first
    empty = all_layers[0].empty_samples
    if len(empty):
        logger.warning(
            "%d of %d samples have no valid label and score zero (first: sample %d)",
            len(empty),
            all_layers[0].n,
            int(empty[0]),
        )
    return scores


@door
def self_influence(
    factors: Factors | nn.Module,
    loader: Any = None,
    *,
    curvature: str = "fisher_diag",
    damping: float = 1e-2,
    layers: Any = "head",
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """``g_i^T M^-1 g_i`` for every sample: [n], not negative (SPEC section 3).

    Arguments and errors as in :func:`influence_scores`.
    """
    all_layers = _factors_of(factors, loader, layers, progress)
    parts = [
        curvature_module.fit(curvature, layer, damping, **options).self_influence(layer)
        for layer in all_layers
    ]
    return torch.stack(parts).sum(dim=0)


@door
def pairwise_influence(
    factors: Factors,
    queries: Factors,
    *,
    curvature: str = "fisher_diag",
    damping: float = 1e-2,
    **options: Any,
) -> Tensor:
    """``- g_i^T M^-1 h_j`` of every sample against every query (data attribution): [n, m].

    Args:
        factors: n samples; they define the curvature.
        queries: m samples of the same layers, with gradients h_j.

    The queries' mean over j is ``influence_scores(factors, target=queries)``.
    """
    all_layers, all_queries = _as_layers(factors, "factors"), _as_layers(queries, "queries")
    if len(all_layers) != len(all_queries):
        raise InputError(f"queries has {len(all_queries)} layers, factors {len(all_layers)}")
    _check_like("queries", all_layers, all_queries)
    total: Tensor | None = None
    for layer, query in zip(all_layers, all_queries, strict=True):
        part = curvature_module.fit(curvature, layer, damping, **options).pairwise(layer, query)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.neg_()
