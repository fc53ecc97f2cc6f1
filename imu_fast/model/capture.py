"""From a model and a loader to gradient factors: hooks, one batched pass, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

from torch import nn
from typing_extensions import Unpack

from imu_fast.distributed import Group, in_step, text_of
from imu_fast.errors import InputError, NoSamplesError, check_finite_rows
from imu_fast.factors.gradient_factors import HeadFactors
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.model.batches import device_of, empty_message, warn_of_order
from imu_fast.model.expectation import Expectation, check_one_group
from imu_fast.model.features import HeadCapture
from imu_fast.model.features import HeadFeatures as HeadFeatures
from imu_fast.model.guard import door
from imu_fast.model.head import LinearLayer, resolve
from imu_fast.model.kept import bytes_of
from imu_fast.model.layers import LayerFactors, capture_layers
from imu_fast.model.loss import check_labelled
from imu_fast.model.reading import Reading, ReadingOptions
from imu_fast.model.run import evaluated, full_precision, read
from imu_fast.model.selection import selected
from imu_fast.model.shared import (
    check_each_once,
    samples_of,
    shared_factors,
    shared_features,
)
from imu_fast.ops.tokens import is_flat


def _explicit(model: nn.Module, head: Any) -> list[LinearLayer]:
    return [] if isinstance(head, str) and head == "head" else [resolve(model, head, "head")]


def _capture_head(
    model: nn.Module,
    loader: Any,
    head: Any,
    reading: Reading,
    progress: bool,
    max_memory: int | None = None,
) -> HeadCapture:
    warn_of_order(loader)
    seen = HeadCapture(model, _explicit(model, head), reading, max_memory)
    with evaluated(model) as run:
        for batch in read(model, loader, progress):
            seen.add(run, batch)
    if not seen.samples:
        raise NoSamplesError(empty_message(loader))
    check_labelled(int(seen.offsets[-1]), seen.samples, seen.loss)
    seen.finish()
    return seen


def head_of(
    model: nn.Module, loader: Any, reading: Reading, head: Any = "head"
) -> tuple[list[str], int]:
    """The layers that make the logits of the first batch, by name, and how many logits there are.

    Raises:
        As :func:`capture_features`.
    """
    seen = HeadCapture(model, _explicit(model, head), reading)
    with evaluated(model) as run:
        for batch in read(model, loader, progress=False):
            seen.add(run, batch)
            break
    return [part.name for part in seen.head.parts], seen.classes


@door
def capture_features(
    model: nn.Module,
    loader: Any,
    head: Any = "head",
    *,
    progress: bool = False,
    group: Group = None,
    **reading: Unpack[ReadingOptions],
) -> HeadFeatures:
    """The classifier's inputs over a loader, in one batched forward pass in evaluation mode.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` or dict batches, or tensors (X, y).
        head: ``"head"``: the linear layer whose output is the model's logits, found while the
            first batch runs; or a module, or its name, which must produce the logits.
        group: of ``torch.distributed``: each process reads its own part of the data, some may have
            none, and all get the features of all, in the order of the ranks.
        reading: how the model is read.

            * ``output``: where the logits are in what the model returns: a key, an attribute, an
              index, a path of these, or a function of it; without, the tensor, what is called
              ``logits``, or what fits the labels.
            * ``loss``: ``"cross_entropy"`` (class indices, or probabilities in the logits' shape),
              ``"binary_cross_entropy"`` or ``"squared_error"`` (labels in the logits' shape; one
              output's may lack its axis); ``"auto"``: as a transformers model's
              ``config.problem_type`` says; or an object such as ``imu.CrossEntropy(shift=True)``.
              Of the named one: ``ignore_index``; ``shift``: logits [B, T, C] at position t predict
              the label at t + 1 (causal models); ``label_smoothing``, ``class_weights``;
              ``pos_weight``.

    Raises:
        InputError: empty loader, labels out of range, several outputs that may be the logits,
            samples that are not independent, features that are not finite.
        NoHeadFoundError: no linear layer, or not the given one, produces the logits, or it is
            not ``act W^T + b``.
    """
    if group is not None:
        return shared_features(
            model,
            loader,
            group,
            lambda part: capture_features(model, part, head, progress=progress, **reading),
        )
    how = Reading.of("capture_features()", reading).following(model)
    found = _capture_head(model, loader, head, how, progress).features()
    whose = len(found.features) == len(found.offsets) - 1 and is_flat(found.offsets)
    check_finite_rows("features", found.features, "sample" if whose else "row")
    return found


Wanted = str | nn.Module | Sequence[str | nn.Module]
Captured = HeadFactors | LayerFactors | list[LayerFactors]


@overload
def capture(
    model: nn.Module,
    loader: Any,
    layers: Wanted = "head",
    *,
    fisher: Literal["exact", "sampled"] | None = None,
    draws: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    group: None = None,
    max_memory: int | str | None = None,
    **reading: Unpack[ReadingOptions],
) -> Captured: ...
@overload
def capture(
    model: nn.Module,
    loader: Any,
    layers: Wanted = "head",
    *,
    fisher: Literal["exact", "sampled"] | None = None,
    draws: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    group: Group,
    max_memory: int | str | None = None,
    **reading: Unpack[ReadingOptions],
) -> ShardedFactors | list[ShardedFactors]: ...
@door
def capture(
    model: nn.Module,
    loader: Any,
    layers: Wanted = "head",
    *,
    fisher: Literal["exact", "sampled"] | None = None,
    draws: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    group: Group = None,
    max_memory: int | str | None = None,
    **reading: Unpack[ReadingOptions],
) -> Captured | ShardedFactors | list[ShardedFactors]:
    """Gradient factors of a model's head, or of any of its linear layers.

    The head is the linear layer whose outputs are the logits, or become them by steps that do not
    mix them by a weight: a temperature, a softcap, a mask, the mean of two heads. Its signal is
    taken at its own output, through those steps.

    Args:
        layers: ``"head"``: the classifier, one forward pass. A name or module: that layer; a
            pattern (``"*.attn.*"``) or the end of names (``"q_proj"``: every ``*.q_proj``), or a
            list of any of these: several. These need one batched forward and backward pass.
            Linear layers, transformers' Conv1D (its weight [d, C] as [C, d]), and convolutions,
            grouped and transposed too: their weight as [C, c, *kernel], c the inputs that an output
            sees, flattened to [C, d]. An adapter's wrapper stands for its base layer; ``"lora_A"``
            for the layers of that name.
        fisher: bring layers the signals of which ``ggn``, ``ggn_block``, ``kfac`` and ``ekfac`` are
            made there, over the model's own predictions: ``"sampled"``: labels drawn from them (the
            true Fisher of Martens and Grosse 2015), one more backward pass and ``delta`` for each
            draw; ``"exact"``: one for each output and position of a batch. None: neither; the head
            needs none, and ``fisher="empirical"`` of these curvatures takes the data's labels.
        draws, seed: of ``"sampled"``: labels drawn at each position (1), and their seed (0): the
            same samples in the same order have the same draws, in whatever batches and processes.
        group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``: each process
            captures its own part of the data, some may have none, and what comes of it are
            :class:`imu_fast.ShardedFactors`, whose sums are over all.
        max_memory: bytes, or a text such as ``"1.5GiB"``, of a head's capture on the CPU and what
            is made of it: features go to a temporary file (of TMPDIR) where they would take more
            than a quarter, and the signal is made where it is needed. Of each process, with
            ``group``. At least 512 MiB; batches and the model itself are not counted.
        reading: ``output``, ``loss`` and its options, as in :func:`capture_features`.

    Returns:
        GradientFactors; for several layers a list, in the order of ``named_parameters``. Of a
        head whose output is the logits and whose signal would take 256 MB or more, an
        ImplicitHead: neither signal nor, where the model does not work with them, logits are
        stored. Of a convolution, UnfoldedFactors, which keep its inputs as they are, but of a
        grouped one whose gradients [C, D] are smaller than these, as of a depthwise one: those.
        Their ``labels`` are None where the loss's curvature in the layer's outputs is not known.
        With ``group`` ShardedFactors of these, or a list.

    Raises:
        As :func:`capture_features`; also where rows of a layer belong to no single sample. With
        ``group``, where processes have other weights, layers or dtypes: in all of them.
    """
    limit = None if max_memory is None else bytes_of("max_memory", max_memory)
    if limit is not None and layers != "head":
        raise InputError(
            f"max_memory={max_memory!r} is of layers='head', whose inputs a file can hold; leave "
            "it out, or capture fewer samples at a time"
        )
    expectation = Expectation.of(fisher, draws, seed)
    if isinstance(layers, str) and layers == "head" and expectation is not None:
        raise InputError(
            f"fisher={fisher!r} with layers='head', whose curvature is in closed form; leave "
            "fisher out, or name the layer"
        )

    def own(expected: Expectation | None) -> Captured:
        how = Reading.of("capture()", reading).following(model)
        if isinstance(layers, str) and layers == "head":
            found = _capture_head(model, loader, "head", how, progress, limit)
            found.say()
            with full_precision(device_of(model)):
                return found.factors()
        warn_of_order(loader)
        ordered, single = selected(model, layers)
        check_one_group(ordered, expected)
        out = capture_layers(model, loader, ordered, how, progress, expected)
        return out[0] if single else out

    if group is None:
        return own(expectation)
    # Inner layers' factors do not say how the logits and the loss above them were read.
    said = {"fisher": fisher} | ({} if expectation is None else expectation.options())
    said |= {name: value for name, value in sorted(reading.items()) if value is not None}
    in_step(f"capture({', '.join(f'{k}={text_of(v)}' for k, v in said.items())})", group)
    check_each_once(loader, group)
    if expectation is None or expectation.kind == "exact":
        return shared_factors(model, group, lambda _: own(expectation))
    # A sample has the draws that its place among all gives it.
    counted = partial(samples_of, model, loader)
    placed = partial(replace, expectation)
    return shared_factors(model, group, lambda first: own(placed(first=first)), counted)
