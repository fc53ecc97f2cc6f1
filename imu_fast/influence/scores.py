"""Influence of samples at a linear layer: ``- g_i^T M^-1 v``, its diagonal and its pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.curvature.base import Curvature, Layer, solved
from imu_fast.curvature.contraction import scores as scores_of
from imu_fast.curvature.gauss_newton import fisher_for, kept_of
from imu_fast.curvature.in_step import check_whole, the_same
from imu_fast.curvature.named import CURVATURES, CurvatureName, OwnOptions
from imu_fast.errors import InputError, check_choice, check_tensor, is_finite
from imu_fast.factors.joint import said
from imu_fast.factors.outputs import at_outputs, cuts_of_outputs
from imu_fast.factors.protocol import is_shared
from imu_fast.factors.sharded_head import ShardedHead
from imu_fast.factors.source import Factors, is_factors
from imu_fast.factors.statistics import empty_samples, mean_gradient
from imu_fast.factors.token_rows import token_rows
from imu_fast.influence.default import attribution_curvature
from imu_fast.influence.split_head import check_default, own_part, refuse
from imu_fast.losses.signals import GroupedRows
from imu_fast.model.guard import door
from imu_fast.model.reading import ReadingOptions, taken

logger = logging.getLogger("imu_fast")

Layers = Factors | ShardedHead | Sequence[Factors]
Per = Literal["sample", "token"]


def as_layers(value: Any, name: str) -> list[Factors]:
    """What a user passed as ``name``, as a list; raises InputError where it is something else."""
    layers = [value]
    if isinstance(value, Iterable) and not is_factors(value):
        layers = list(value)
    refuse(name, layers)
    if not layers or not all(is_factors(layer) for layer in layers):
        raise InputError(
            f"{name} must be GradientFactors, or a list of them (one per layer); got "
            f"{type(value).__name__}. Build them with imu_fast.capture(model, loader)"
        )
    if len({layer.n for layer in layers}) > 1:
        raise InputError(f"{name}: layers disagree on n: {[layer.n for layer in layers]}")
    return layers


class ScoreOptions(OwnOptions, ReadingOptions, total=False):
    """Flat options of the curvature, and of how a model is read."""


def factors_of(
    source: Any,
    data: Any,
    layers: Any,
    progress: bool,
    reading: dict[str, Any],
    spec: Curvature | None = None,
) -> list[Factors]:
    """Those that a user passed, or captured of the model passed; raises InputError.

    Args:
        spec: what will be fitted to them.
    """
    if isinstance(source, nn.Module):
        if data is None:
            raise InputError("data=None: pass the samples after the model")
        from imu_fast.model.capture import capture

        how: dict[str, Any] = {"progress": progress, "fisher": fisher_for(spec, layers)}
        source = capture(source, data, layers=layers, **how, **reading)
    elif data is not None:
        raise InputError("data is only used with a model; pass factors alone")
    elif not (isinstance(layers, str) and layers == "head"):
        raise InputError(
            f"layers={layers!r} says which layers of a model are captured, and source is factors, "
            "which are of theirs; pass it to imu_fast.capture, or choose among the factors"
        )
    elif given := [name for name, value in reading.items() if value is not None]:
        raise InputError(
            f"{given[0]} says how a model is read, and source is factors, which are captured "
            "already; pass it to imu_fast.capture"
        )
    return as_layers(source, "source")


def check_like(name: str, layers: list[Factors], others: list[Factors]) -> None:
    """Raise InputError unless both are of the same layers."""
    shapes = [(*Layer.of(x), x.dtype) for x in layers]
    other_shapes = [(*Layer.of(x), x.dtype) for x in others]
    if shapes != other_shapes:
        raise InputError(
            f"{name} has layers (C, D, bias, device, dtype) {other_shapes}, factors have {shapes}; "
            "capture both from the same model and layers"
        )


Goal = Factors | Tensor | None
"""What v is at one layer: the mean gradient of other samples, given [C, D], or of these samples."""


def _goals(target: Any, layers: list[Factors]) -> list[Goal]:
    """What ``v`` is of each layer."""
    if target is None:
        return [None] * len(layers)
    many = isinstance(target, Sequence)
    if isinstance(target, Tensor) or (many and target and isinstance(target[0], Tensor)):
        vectors = [target] if isinstance(target, Tensor) else list(target)
        for v in vectors:
            check_tensor("target", v, "floating", "[C, D]")
        shapes = [(layer.num_classes, layer.width) for layer in layers]
        if [tuple(v.shape) for v in vectors] != shapes:
            raise InputError(
                f"target has shapes {[tuple(v.shape) for v in vectors]}; expected one [C, D] per "
                f"layer: {shapes}"
            )
        for v in vectors:
            if not is_finite(v):
                raise InputError("target is not finite; remove the NaN or infinite entries")
        return [*vectors]
    others = as_layers(target, "target")
    check_like("target", layers, others)
    return [*others]


def _cuts(spec: Curvature, layer: Factors, other: Goal = None) -> list[slice]:
    """Outputs that are dealt with at a time: all, where M couples them."""
    if not spec.separates:
        return [slice(0, layer.num_classes)]
    return cuts_of_outputs(layer, *([] if other is None or isinstance(other, Tensor) else [other]))


def target_vectors(target: Any, layers: list[Factors]) -> list[Tensor]:
    """``v`` of each layer [C, D]: the mean forget gradient, another set's mean, or given."""
    goals = _goals(target, layers)
    return [
        _vector(goal, layer, slice(0, layer.num_classes))
        for goal, layer in zip(goals, layers, strict=True)
    ]


def _vector(goal: Goal, part: Factors, classes: slice, *, check: bool = True) -> Tensor:
    """v at some outputs of a layer; new memory, unless it was given.

    Args:
        check: whether it is finite, which else shows in the scores.
    """
    if goal is None:
        return mean_gradient(part, check=check)
    if isinstance(goal, Tensor):
        return the_same("target", goal[classes].to(part.device, part.dtype), part)
    mean = mean_gradient(at_outputs(goal, classes), check=check)
    return mean if is_shared(goal) else the_same("target", mean, part)


def _of_kind(target: Any) -> str:
    """As processes that share samples have to have it alike."""
    parts = target if isinstance(target, list | tuple) else [target]
    return "shared" if any(map(is_shared, parts)) else type(target).__name__


@door
def influence_scores(
    source: Layers | nn.Module,
    data: Any = None,
    *,
    curvature: CurvatureName | Curvature = "fisher_diag",
    damping: float | None = None,
    target: Any = None,
    layers: Any = "head",
    first_row_is_mean: bool = False,
    per: Per = "sample",
    progress: bool = False,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """``influence_i = - g_i^T M^-1 v`` of every sample.

    Negative means that the sample pulls with the mean gradient.

    Args:
        source: GradientFactors, a list of them (one per layer: scores add up, ``M`` is block
            diagonal over layers), or a model, captured over ``data`` in one batched pass; or a
            :class:`imu_fast.ShardedHead`.
        curvature: what M is: a name out of :func:`imu_fast.curvatures`, or an object with its own
            options, such as ``imu.GGN(damping=1e-3)``.
        damping: lam > 0 of the named curvature, in units of squared gradients (of the mean
            eigenvalue with ``damping_mode="relative"``); None: its default.
        target: what ``v`` is: None for the samples' mean gradient; factors of a query or validation
            set, whose mean gradient is taken; or a tensor [C, D] (a list with one per layer), of a
            ShardedHead this process's rows of it.
        layers: which layers to capture, if a model is given.
        first_row_is_mean: reproduce a defect of the IMU authors' published code, whose in-place sum
            overwrites sample 0's gradient with the mean: its score becomes ``-gbar^T M^-1 gbar``.
        per: ``"token"``: of one layer, the share of each of its N packed tokens,
            ``- delta_t^T X a~_t``: tokens ``offsets[i]:offsets[i+1]`` of the factors are sample i's
            and add up to its score. At the head these are the positions that have a label, in
            order; at inner layers the rows that have a gradient, in order. A layer of several
            groups has no such rows.
        options: others of the named curvature, such as ``damping_mode="clamp"``; and, with a model,
            how it is read: ``output``, ``loss``, ``ignore_index``, ``shift``, as of
            :func:`imu_fast.capture_features`.

    Returns:
        [n], or [N] per token, in the factors' dtype and on their device.

    Raises:
        InputError: unknown curvature, an option that it does not have or a bad value; factors,
            target or data that do not fit; factors that the curvature cannot be made of.
    """
    reading, own = taken(options)
    spec = CURVATURES.choose(curvature, damping=damping, **own)
    check_choice("per", per, get_args(Per))
    if isinstance(source, ShardedHead):
        more: Any = {"per": per, "first_row_is_mean": first_row_is_mean, **reading}
        goal = own_part("target", target, source)
        return source.over_classes(
            f"influence_scores({spec!r}, target={_of_kind(target)}, {more})",
            spec,
            lambda: influence_scores(
                source.own, data, curvature=spec, target=goal, layers=layers, **more
            ),
        )
    all_layers = factors_of(source, data, layers, progress, reading, spec)
    rows = rows_to_score(all_layers, per)
    if first_row_is_mean and per == "token":
        raise InputError("first_row_is_mean=True is of samples; leave it out with per='token'")
    if first_row_is_mean:
        check_whole("first_row_is_mean=True: source", all_layers[0])
    said(all_layers, lambda: f"influence_scores({spec!r}, target={_of_kind(target)})")
    goals = _goals(target, all_layers)
    scores: Tensor | None = None
    first = 0.0
    for layer, goal in zip(all_layers, goals, strict=True):
        for classes in _cuts(spec, layer, goal):
            part = at_outputs(layer, classes)
            v = _vector(goal, part, classes, check=not spec.separates)
            # In place where v is ours: fresh memory of size C x D costs as much as the division.
            x = solved(spec.fit(part), v, out=None if isinstance(goal, Tensor) else v)
            x = x.to(layer.device)
            found = scores_of(rows(part), x).neg_()
            scores = found if scores is None else scores.add_(found)
            if first_row_is_mean:
                first -= float((mean_gradient(part) * x).sum())
            del part, v, x  # before the next outputs' signal is made beside these
    assert scores is not None
    if first_row_is_mean:
        scores[0] = first
    if empty := empty_samples(all_layers[0]):
        logger.warning(
            "%d of %d samples have no valid label and score zero (first: sample %d)",
            len(empty),
            all_layers[0].n_here,
            empty[0],
        )
    return scores


@door
def self_influence(
    source: Layers | nn.Module,
    data: Any = None,
    *,
    curvature: CurvatureName | Curvature = "fisher_diag",
    damping: float | None = None,
    layers: Any = "head",
    progress: bool = False,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """``g_i^T M^-1 g_i`` of every sample: [n], not negative.

    Arguments and errors as in :func:`influence_scores`.
    """
    reading, own = taken(options)
    spec = CURVATURES.choose(curvature, damping=damping, **own)
    if isinstance(source, ShardedHead):
        more: Any = reading
        return source.over_classes(
            f"self_influence({spec!r})",
            spec,
            lambda: self_influence(source.own, data, curvature=spec, layers=layers, **more),
        )
    all_layers = factors_of(source, data, layers, progress, reading, spec)
    said(all_layers, lambda: f"self_influence({spec!r})")
    total: Tensor | None = None
    for layer in all_layers:
        for classes in _cuts(spec, layer):
            part = at_outputs(layer, classes)
            found = spec.fit(part).self_influence(part)
            total = found if total is None else total.add_(found)
            del part
    assert total is not None
    return total


def rows_to_score(layers: list[Factors], per: Per) -> Callable[[Factors], Factors]:
    """What scores are of: samples, or the tokens of one layer.

    Raises:
        InputError: tokens of several layers, whose rows differ, of a layer of several groups, or
            shared among processes.
    """
    if per == "sample":
        return lambda part: part
    if len(layers) > 1:
        raise InputError(
            f"per='token' of {len(layers)} layers, whose rows are not the same tokens; score one "
            "layer at a time: samples' scores add up over layers"
        )
    check_whole("per='token': source", layers[0])
    if isinstance(kept_of(layers[0]), GroupedRows):
        raise InputError(
            f"per='token' of layer {layers[0].name!r}, which has several groups: its factors are "
            "columns of gradients or parts of positions, and no tokens of a sample; use "
            "per='sample', or another layer"
        )
    return token_rows


def curvature_of_pairs(
    layers: list[Factors], curvature: CurvatureName | Curvature | None, given: dict[str, Any]
) -> Curvature:
    """The one that is named, with flat options, or the default of data attribution.

    Raises:
        InputError: options without a curvature that they are of.
    """
    if curvature is not None:
        return CURVATURES.choose(curvature, **given)
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if named:
        raise InputError(
            f"{', '.join(named)} without a curvature, which is then chosen by what the factors "
            "have; name the one that is meant, such as curvature='ekfac'"
        )
    return attribution_curvature(layers)


@door
def pairwise_influence(
    source: Layers,
    queries: Layers,
    *,
    curvature: CurvatureName | Curvature | None = None,
    damping: float | None = None,
    per: Per = "sample",
    **options: Unpack[OwnOptions],
) -> Tensor:
    """``- g_i^T M^-1 h_j`` of every sample against every query (data attribution): [n, m].

    Args:
        source: factors of n samples; they define the curvature.
        queries: factors of m samples of the same layers, with gradients h_j.
        curvature: what M is, as in :func:`influence_scores`. None: not its default, which is the
            paper's for unlearning, but ``imu.EKFAC(damping=1e-2, damping_mode="relative")``, by
            linear datamodeling scores on development data (docs/validation.md); with
            ``fisher="empirical"`` where the loss's curvature is not known at every layer, and
            ``imu.FisherDiag()`` where a layer has more than 4,096 outputs or inputs, or several
            groups. The log says which (level INFO).
        damping, options: of the curvature that is named.
        per: ``"token"``: [N, m], the share of each of source's tokens in its sample's influence, as
            in :func:`influence_scores`.

    Under one curvature the queries' mean over j is ``influence_scores(source, target=queries)``.
    Errors as there.
    """
    if isinstance(source, ShardedHead):
        check_default(source, curvature)
        known: Any = [source]
        one = curvature_of_pairs(known, curvature, {"damping": damping, **options})
        asked = own_part("queries", queries, source)
        return source.over_classes(
            f"pairwise_influence({one!r}, per={per!r})",
            one,
            lambda: pairwise_influence(source.own, asked, curvature=one, per=per),
        )
    all_layers, all_queries = as_layers(source, "source"), as_layers(queries, "queries")
    check_choice("per", per, get_args(Per))
    rows = rows_to_score(all_layers, per)
    spec = curvature_of_pairs(all_layers, curvature, {"damping": damping, **options})
    if len(all_layers) != len(all_queries):
        raise InputError(f"queries has {len(all_queries)} layers, source {len(all_layers)}")
    check_like("queries", all_layers, all_queries)
    said(all_layers, lambda: f"pairwise_influence({spec!r})")
    total: Tensor | None = None
    for layer, query in zip(all_layers, all_queries, strict=True):
        for classes in _cuts(spec, layer, query):
            part = at_outputs(layer, classes)
            found = spec.fit(part).pairwise(rows(part), at_outputs(query, classes))
            total = found if total is None else total.add_(found)
            del part
    assert total is not None
    return total.neg_()
