"""Unlearning of a head by processes that share the samples: each runs the model on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from imu_fast import distributed
from imu_fast.errors import InputError
from imu_fast.model.capture import HeadFeatures, capture_features
from imu_fast.model.guard import copied, copies_of, put_back
from imu_fast.model.head import check_not_frozen
from imu_fast.model.reading import Reading
from imu_fast.unlearning.ascent.ascent import Ascent
from imu_fast.unlearning.ascent.retain import RETAIN, Retain
from imu_fast.unlearning.ascent.scopes import Head
from imu_fast.unlearning.depth import StopRule
from imu_fast.unlearning.edit.margin_edit import MarginEdit
from imu_fast.unlearning.edit.newton import NewtonRemoval
from imu_fast.unlearning.method import Method
from imu_fast.unlearning.result import Record, UnlearnResult
from imu_fast.unlearning.subject import naming
from imu_fast.unlearning.summary.summary import TrainingSummary

Run = Callable[..., UnlearnResult]


def unlearn_shared(
    run: Run,
    model: nn.Module,
    data: Any,
    method: Method,
    reading: Reading,
    group: distributed.Group,
    *,
    rules: tuple[StopRule | None, Mapping[str, StopRule] | None],
    watch: Mapping[str, Any],
    inplace: bool,
    **given: Any,
) -> UnlearnResult:
    """Forget the samples of all processes: features are gathered, and each changes its own head.

    A head that the model ends in is a model, too, whose data are its inputs; so it is unlearned
    like any other, alike in every process, and has the first one's bits at the end.

    Args:
        run: :func:`imu_fast.unlearn`. rules: stop and milestones.
        given: its other arguments.

    Raises:
        InputError: the method changes more than a head, or more stands between it and the logits.
    """
    watched = distributed.gather(given["callback"] is not None, group)
    if distributed.rank_of(group):
        # One that does nothing, where any process has one: it says when records are made.
        silent = _ignore if any(watched) else None
        given |= {"callback": silent, "on_milestone": None, "checkpoint": None, "progress": False}
    layer, alone = _on_the_head(method.bind(model))  # by name, which a copy has too
    stop, milestones = rules
    for rule in (stop, *(milestones or {}).values()):
        _check_rule(rule)
    depths = {name: _numbers(rule) for name, rule in {"": stop, **(milestones or {})}.items()}
    said = f"unlearn({_text(method)}, {depths}, {sorted(watch)}, seed={given['seed']})"
    distributed.in_step(said, group)
    target = model if inplace else copied(model)

    def read(part: Any) -> HeadFeatures:
        found = capture_features(target, part, layer or "head", group=group, **reading.given())
        _check_plain(found, target, named=layer is not None)
        return found

    found = read(data)
    if (summary := getattr(method, "summary", None)) is not None:
        # Here, for what runs below has the head alone, and cannot see what is before it.
        [(part, _)] = found.parts
        summary.check_head(target, part.matrix, part.bias is not None, len(found.offsets) - 1)
    if isinstance(alone, Ascent) and isinstance(alone.retain, Retain):
        with naming(RETAIN):
            kept = read(alone.retain.data)
        data_kept = (kept.features, kept.labels)
        alone = replace(alone, retain=replace(alone.retain, data=data_kept))
    sets = {}
    for name, part in watch.items():
        with naming(name):
            one = read(part)
            sets[name] = (one.features, one.labels)
    before = copies_of(found.head.parameters())
    try:
        result = _run_alike(run, found, alone, group, stop, milestones, sets, reading, given)
    except BaseException:
        put_back(before)  # another process may have failed after this one was done
        raise
    result.model, result.dataset_indices = target, None
    return result


def _text(method: Method) -> str:
    """The method with all that processes have to have alike; retained data are each one's own."""
    flat = {k: v for k, v in method.flat().items() if k not in ("data", "layer")}
    shown = (f"{name}={distributed.text_of(_shown(value))}" for name, value in flat.items())
    return f"{type(method).__name__}({', '.join(shown)})"


def _shown(value: Any) -> Any:
    if isinstance(value, TrainingSummary):
        return [value, value.fingerprint, value.model, value.second_moment]
    return value


def _numbers(rule: StopRule | None) -> dict[str, float]:
    return {} if rule is None else {k: float(v) for k, v in vars(rule).items() if v is not None}


def _ignore(record: Record) -> None:
    """A callback of a process that is not the first."""


def _run_alike(
    run: Run,
    found: HeadFeatures,
    method: Method,
    group: distributed.Group,
    stop: StopRule | None,
    milestones: Mapping[str, StopRule] | None,
    watch: Mapping[str, Any],
    reading: Reading,
    given: Mapping[str, Any],
) -> UnlearnResult:
    """The head on the features of all processes; the first one's bits in the end."""
    result = run(
        found.head,
        (found.features, found.labels),
        method,
        stop=stop,
        milestones=milestones,
        watch=watch,
        inplace=True,
        loss=reading.loss,
        **given,
    )
    with torch.no_grad():
        for parameter in found.head.parameters():
            distributed.from_first(parameter, group)
    return result


def _on_the_head(method: Method) -> tuple[Any, Method]:
    """Which head, and the method where that is all there is."""
    if isinstance(method, MarginEdit | NewtonRemoval):
        return method.layer, replace(method, layer=None)
    nearest = isinstance(method, Ascent) and not method.sequences
    if isinstance(method, Ascent) and isinstance(method.scope, Head) and not nearest:
        return method.scope.layer, replace(method, scope=replace(method.scope, layer=None))
    what = "moves the model's inputs" if nearest else "may change more"
    raise InputError(
        f"group: processes can share the samples of what changes the head alone, and method="
        f"{method.name or type(method).__name__!r} {what}; use scope='head', 'single_row' or "
        "'margin_edit', 'newton_removal', or leave group out"
    )


def _check_rule(rule: StopRule | None) -> None:
    if rule is None:
        return
    data = rule.unseen is not None
    try:
        data |= rule.unseen_accuracy is not None and float(rule.unseen_accuracy) < 0
    except (TypeError, ValueError):
        data = True
    if data:
        raise InputError(
            f"{rule!r} measures unseen data, which processes do not share; pass unseen_accuracy as "
            "a number, imu_fast.evaluate(model, unseen).accuracy of all of it"
        )


def _check_plain(found: HeadFeatures, model: nn.Module, named: bool) -> None:
    if found.sequences:
        raise InputError(
            "samples have labels at positions; processes share samples of one label each: leave "
            "group out"
        )
    coarser = torch.finfo(found.computed).eps > torch.finfo(found.head.weight.dtype).eps
    if not found.linear or not found.plain or coarser:
        why = found.why or "its outputs are rounded to a coarser dtype"
        raise InputError(
            f"head {found.name!r}: {why}; processes share the samples of a head that the model "
            "ends in, and in nothing else: leave group out"
        )
    if not named:
        check_not_frozen(model, found.name, [part.module for part, _ in found.parts])
