"""The door: make a classifier forget, by any method."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.backend import record_backends
from imu_fast.distributed import Group
from imu_fast.errors import InputError, check_flag, check_seed
from imu_fast.model.batches import ForgetSet, as_batches, rereadable
from imu_fast.model.causal import settled_on
from imu_fast.model.forward import forward_of
from imu_fast.model.guard import copied, door, preserved, rolled_back
from imu_fast.model.labels import is_integer
from imu_fast.model.outputs import measured
from imu_fast.model.reading import Reading, ReadingOptions, taken
from imu_fast.model.run import right_batch_norms
from imu_fast.storage import writable
from imu_fast.unlearning.auto import Auto
from imu_fast.unlearning.confirm import warn_unless_reached
from imu_fast.unlearning.depth import Depths, OnMilestone, StopRule
from imu_fast.unlearning.identity import of_data, of_forget_set, of_model
from imu_fast.unlearning.method import Job, Method
from imu_fast.unlearning.named import METHODS, MethodName, MethodOptions
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.shared import unlearn_shared
from imu_fast.unlearning.subject import naming
from imu_fast.unlearning.trajectory import Callback

logger = logging.getLogger("imu_fast")


class UnlearnOptions(MethodOptions, ReadingOptions, total=False):
    """Flat options of the method, and of how the model is read."""


_TAKEN = ("forget", "unseen")


@door
def unlearn(
    model: nn.Module,
    data: Any,
    method: MethodName | Method = "imu",
    *,
    stop: StopRule | None = None,
    milestones: Mapping[str, StopRule] | None = None,
    on_milestone: OnMilestone | None = None,
    watch: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = False,
    inplace: bool = True,
    group: Group = None,
    **options: Unpack[UnlearnOptions],
) -> UnlearnResult:
    """Make a model forget, with the forget set only (IMU, arXiv 2508.01620).

    Args:
        model: a classifier or a language model that ends in a linear layer.
        data: the forget set: a DataLoader, a re-iterable of ``(inputs, labels)`` batches, or
            tensors (X, y). Where samples are sequences, each counts as the mean over its tokens
            that have a label, and its accuracy is the fraction of these that are predicted.
        method: a name out of :func:`imu_fast.methods`, or an object: ``imu.Ascent(...)``,
            ``imu.MarginEdit(...)``. By name: ``"imu"`` and its controls ``"permuted"``,
            ``"loss_weights"`` and ``"uniform"`` (plain gradient ascent); ``"npo"``,
            ``"random_label"``, ``"boundary_shrink"``, ``"preconditioned"``, ``"single_row"``: all
            of them an ``Ascent``; ``"margin_edit"``, one quadratic program and no ascent;
            ``"newton_removal"``, one Newton step to the head trained without the forget set;
            ``"self_distillation"``, the model's own predictions with the labels' logits lowered,
            taught to the last layers;
            ``"auto"``, the best recipe found so far for a class or for random samples
            (``task="class"`` or ``"samples"`` says which, ``unseen`` how deep samples go),
            also with a ``summary`` of the training set, or for sequences (``unseen`` or a stop rule
            is needed, ``retain`` is used); ``result.settings["auto"]`` says why.
        stop: a :class:`StopRule`, tested after every step; the last step is bisected. None: the
            method's budget; of ``"auto"`` forget accuracy 0 for a class, and for samples that on
            ``unseen``, without which they go to 0 and a warning asks for it. Samples that are
            predicted no better than ``unseen`` are left alone, and it is said.
        milestones: depths on the way, by name; without ``stop`` the last one ends the run.
        on_milestone: ``(name, record)``, called at each with the model there (bisected as a stop).
        watch: data to measure at every record, by name.
        callback: called with each record of the trajectory as it is made (wandb, tensorboard);
            with ``scope="head"`` the model itself changes only at milestones and at the end.
        checkpoint: a safetensors file, replaced atomically after each epoch; if it exists and
            ``resume``, the run goes on from there and ends as an uninterrupted one would. The
            forget set has to come in the same order (``shuffle=False``, or a generator and its
            seed). Only for methods that have epochs.
        seed: of the batch order, dropout, wrong labels and permuted weights.
        inplace: change the user's model; otherwise a copy.
        group: of ``torch.distributed``: each process has its own part of ``data`` and of watched
            sets, and all change alike, as one process with all of it would. For methods that change
            a head alone; callbacks and checkpoints are the first process's.
        options: of the named method, flat; an object has its own. An option that the method does
            not have is an error that lists those it has. None is the default. Those of ``Ascent``:

            * ``epochs`` (10), ``max_steps``: the budget. ``batch_size`` (256). ``alpha`` (0):
              weight of the L1 norm of the trained parameters. ``record``: an entry per ``"epoch"``
              or ``"step"``.
            * ``lr`` (0.01), ``momentum`` (0.9), ``weight_decay`` (5e-4) of SGD. ``optimizer``: a
              class out of ``torch.optim``, which gets those of the three that are given, or a
              function of a list of tensors (for the head one tensor [C, D], weight and bias).
            * ``scope``: ``"head"`` (default), on features captured once, with ``layers`` (which
              one), ``rows="forgotten"`` (only those of the forgotten classes) and ``precondition``
              (``"features"``, ``"ggn"``, ``"kfac"``, a second moment [D, D] or a fitted curvature;
              ``precondition_eps``). ``"layers"``: the modules named by ``layers``. ``"all"``. These
              two have ``batchnorm`` and ``dropout``: ``"eval"`` (default) or ``"train"``.
            * ``objective``: ``"ce"`` (default), ``"margin"``, ``"log1mp"``, ``"npo"``,
              ``"relabel"``.
            * ``weights``: ``"influence"``, ``"permuted"``, ``"loss"``, ``"uniform"``; but for the
              last with ``top_fraction``, ``clip_quantile``, ``quantile_over``, ``on_empty``
              (:func:`imu_fast.influence_weights`) and ``reweight``: ``"once"``, each ``"epoch"``,
              ``"batch"``. Influence has ``curvature`` with its options,
              ``first_row_is_mean`` (:func:`imu_fast.influence_scores`), and ``scored``: the
              ``"head"``, or all linear layers and convolutions that are ``"trained"``.
            * ``preset="paper"``: as the authors' code: the layers whose name contains ``fc`` are
              scored and trained, the whole model in training mode (so BatchNorm's running
              statistics drift and dropout is active), ``alpha=0.2``, ``top_fraction=0.1``.
              Options that are given win.

            Those of ``MarginEdit``: ``margin`` (0.1), ``metric`` (``"features"`` or ``"ggn"``),
            ``precondition_eps``, ``precondition`` (a second moment [D, D]), ``layers`` (which
            head). Of ``NewtonRemoval``: ``eps``, ``k``, ``then`` (``"scale"`` or
            ``"margin_edit"``), ``margin``, ``layers``. Of ``SelfDistillation``: ``layers`` (those
            beside the head), ``margin``, ``eps``, ``lr``, ``max_steps``, ``calibrated``,
            ``targets``. Of all three and of ``Auto``: ``summary``, of the training set, by
            :func:`imu_fast.save_summary`.

            How the model is read, by whatever method, for the forget set and every watched one:
            ``output``, ``loss``, ``ignore_index``, as of :func:`imu_fast.capture_features`.

    Returns:
        UnlearnResult. On any exception, Ctrl-C included, the user's model is as it was.

    Raises:
        InputError, NoHeadFoundError: bad arguments or data, before any work.
        EmptySelectionError: no forget sample has negative influence.
        DivergedError: the loss became non-finite.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    seed = check_seed("seed", seed)
    for flag, value in (("inplace", inplace), ("resume", resume), ("progress", progress)):
        check_flag(flag, value)
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise InputError(f"checkpoint={checkpoint!r} is no path; pass a file name")
    check_names("watch", watch)
    check_names("milestones", milestones)
    depths = Depths(stop, milestones, on_milestone)
    label = method if isinstance(method, str) else type(method).__name__
    read, own = taken(options)
    reading = Reading.of("unlearn()", read)
    how = METHODS.choose(method, **own)
    if callback is not None and not callable(callback):
        raise InputError(f"callback={callback!r} cannot be called; pass a function of a record")
    if group is not None:
        return unlearn_shared(
            unlearn,
            model,
            data,
            how,
            reading,
            group,
            rules=(stop, milestones),
            watch=watch or {},
            inplace=inplace,
            on_milestone=on_milestone,
            callback=callback,
            checkpoint=checkpoint,
            resume=resume,
            seed=seed,
            progress=progress,
        )
    forget: ForgetSet | None = None
    said: dict[str, Any] = {}
    if isinstance(how, Auto):
        forget = ForgetSet(data, how.batches_of, model)
        if _check_forgettable(forget, how, label):
            label, how, depths, why = how.for_sequences(model, depths)
        else:
            label, how, depths, why = how.for_task(model, forget, reading, depths)
        said = {"auto": why}
    if checkpoint is not None and not how.resumable:
        raise InputError(
            f"checkpoint={os.fspath(checkpoint)!r} with method={label!r}: it has no epochs to go "
            "on from; leave checkpoint out"
        )
    how = how.bind(model)
    forget = forget if forget is not None and forget.batch_size == how.batches_of else None
    forget = forget or ForgetSet(data, how.batches_of, model)
    sequences = _check_forgettable(forget, how, label)
    if sequences:
        reading.of_tokens("unlearn()")
    else:
        reading.of_classes("unlearn()")
    if sequences or forward_of(model).labels is not None:  # else no loss of its own
        reading = settled_on(reading, model, forget)
    described = {"method": label, "seed": seed, **how.flat(), **reading.flat()}
    depths = depths.measured(lambda unseen: _accuracy_on(unseen, model, reading))
    lines = [rule.unseen_accuracy for rule in depths.rules if rule.unseen_accuracy is not None]
    if lines:
        described["unseen_accuracy"] = lines[-1]
    target = model if inplace else copied(model)
    job = Job(
        target,
        forget,
        _sets(target, forget, watch or {}, depths.unseen),
        list(watch or {}),
        depths,
        callback,
        None if checkpoint is None else Path(checkpoint),
        resume,
        seed,
        progress,
        {name: _plain(value) for name, value in described.items()},
        reading,
        sequences,
    )
    if job.checkpoint is not None:
        writable(job.checkpoint, "checkpoint")
        job.belongs |= {"model": of_model(target), **of_forget_set("forget set", forget)}
        for name, batches in job.sets.items():
            if name != "forget":
                job.belongs[f"set {name!r}"] = of_data(partial(as_batches, batches, target))
    with (
        record_backends() as used,
        rolled_back(target, []) as job.kept,
        preserved(target, buffers=False),
        right_batch_norms(target),
    ):
        result = how.run(job)
    wanted = "; ".join(map(repr, depths.rules[-1:]))
    if result.reached and result.trajectory[-1]["step"] == 0:
        accuracy = result.trajectory[-1]["forget_accuracy"]
        logger.warning(
            "the forget set is as deep as %s before any step (forget accuracy %.3f): none is made",
            wanted,
            accuracy,
        )
    warn_unless_reached(result.reached, wanted, result.trajectory[-1])
    result.dataset_indices = forget.dataset_indices
    result.backends, result.precisions = dict(used), dict(used.precisions)
    result.settings = described | said | result.settings
    result.seconds = time.perf_counter() - started
    return result


def check_names(argument: str, value: Any) -> None:
    """Raise InputError unless this is None, or something by names."""
    if value is not None and not isinstance(value, Mapping):
        raise InputError(
            f"{argument} is a {type(value).__name__}; pass a dict, by names such as 'test'"
        )
    for name in value or {}:
        if not isinstance(name, str) or not name:
            raise InputError(f"{argument} has the name {name!r}; names are texts, such as 'test'")


def _accuracy_on(unseen: Any, model: nn.Module, reading: Reading) -> float:
    """Of the model as it is, on data that it never saw."""
    with naming("(unseen_accuracy of a StopRule)"):
        found = measured(model, unseen, reading, "unlearn()")
    logger.info("unseen accuracy %.4f, on %d samples", found.accuracy, len(found.loss))
    return found.accuracy


def _sets(
    model: nn.Module, forget: ForgetSet, watch: Mapping[str, Any], unseen: Any
) -> dict[str, Any]:
    """Every set that is measured, by name."""
    for name in watch:
        if name in _TAKEN:
            raise InputError(f"watch has a loader named {name!r}; choose another name")
    sets: dict[str, Any] = {"forget": forget}
    for name, data in (dict(watch) if unseen is None else {**watch, "unseen": unseen}).items():
        with naming(name):
            sets[name] = rereadable(data, model)
    return sets


def _check_forgettable(forget: ForgetSet, how: Method, label: str) -> bool:
    """Whether the samples are sequences, with labels at positions.

    Raises:
        InputError: they are, and the method forgets samples of one label.
    """
    labels = forget.get([0]).labels
    shape = tuple(labels.shape[1:])
    sequences = is_integer(labels.dtype) and shape not in ((), (1,))
    if sequences and not how.sequences:
        named = [name for name in METHODS if METHODS[name].sequences]
        raise InputError(
            f"each forget sample has labels of shape {shape}; method={label!r} is for samples of "
            f"one label. Sequences are forgotten by {', '.join(named)}, whose objective is a mean "
            "over tokens"
        )
    return sequences


def _plain(value: Any) -> Any:
    """An option's value for a file: what it is, where it is no number, word or list of them."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, sum {float(value.double().sum())!r}"
    if callable(value) or not is_dataclass(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
