"""From a model and a loader to gradient factors: hooks, one batched pass, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.losses.cross_entropy import IGNORE_INDEX
from imu_fast.model.batches import device_of, empty_message, warn_of_order
from imu_fast.model.features import HeadCapture
from imu_fast.model.features import HeadFeatures as HeadFeatures
from imu_fast.model.guard import door
from imu_fast.model.head import linear_layers, resolve
from imu_fast.model.layers import capture_layers
from imu_fast.model.run import evaluated, full_precision, read


def _capture_head(
    model: nn.Module,
    loader: Any,
    head: Any,
    *,
    ignore_index: int,
    shift_labels: bool,
    output: Any,
    progress: bool,
) -> HeadCapture:
    warn_of_order(loader)
    explicit = [] if isinstance(head, str) and head == "head" else [resolve(model, head, "head")]
    seen = HeadCapture(model, explicit, output, ignore_index, shift_labels)
    with evaluated(model) as run:
        for batch in read(model, loader, progress):
            seen.add(run, batch)
    if not seen.samples:
        raise InputError(empty_message(loader))
    seen.finish()
    return seen


@door
def capture_features(
    model: nn.Module,
    loader: Any,
    head: Any = "head",
    *,
    ignore_index: int = IGNORE_INDEX,
    progress: bool = False,
    shift_labels: bool = False,
    output: Any = None,
) -> HeadFeatures:
    """The classifier's inputs over a loader, in one batched forward pass in evaluation mode.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` or dict batches, or tensors (X, y).
        head: ``"head"``: the linear layer whose output is the model's logits, found while the
            first batch runs; or a module, or its name, which must produce the logits.
        shift_labels: logits [B, T, C] at position t predict the label at t + 1 (causal models).
        output: where the logits are in what the model returns: a key, an attribute, an index, or
            a function of it; None: the tensor, what is called ``logits``, or what fits the labels.

    Raises:
        InputError: empty loader, labels out of range, several outputs that may be the logits,
            samples that are not independent.
        NoHeadFoundError: no linear layer, or not the given one, produces the logits, or it is
            not ``act W^T + b``.
    """
    found = _capture_head(
        model,
        loader,
        head,
        ignore_index=ignore_index,
        shift_labels=shift_labels,
        output=output,
        progress=progress,
    )
    return found.features()


@door
def capture(
    model: nn.Module,
    loader: Any,
    layers: str | nn.Module | Sequence[str | nn.Module] = "head",
    *,
    ignore_index: int = IGNORE_INDEX,
    progress: bool = False,
    shift_labels: bool = False,
    output: Any = None,
) -> GradientFactors | list[GradientFactors]:
    """Gradient factors of a model's head, or of any of its linear layers.

    The head is the linear layer whose outputs are the logits, or become them by steps that do not
    mix them by a weight: a temperature, a softcap, a mask, the mean of two heads. Its signal is
    taken at its own output, through those steps.

    Args:
        layers: ``"head"``: the classifier, one forward pass. A name or module: that layer; a list:
            several. These need one batched forward and backward pass. Linear layers, and
            convolutions that act as such.
        output, shift_labels: as in :func:`capture_features`.

    Returns:
        GradientFactors; for a list of layers a list, in the order of ``named_parameters``.
        Their ``labels`` are None where curvatures of a softmax head do not hold.

    Raises:
        As :func:`capture_features`; also where rows of a layer belong to no single sample.
    """
    if isinstance(layers, str) and layers == "head":
        found = _capture_head(
            model,
            loader,
            "head",
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            output=output,
            progress=progress,
        )
        found.say()
        with full_precision(device_of(model)):
            return found.factors()
    warn_of_order(loader)
    single = isinstance(layers, str | nn.Module)
    wanted = [layers] if single else list(layers)  # type: ignore[arg-type]
    if not wanted:
        raise InputError("layers=[] names no layer; pass 'head' or a list of linear layers")
    chosen_layers = [resolve(model, layer) for layer in wanted]
    twice = [layer.name for k, layer in enumerate(chosen_layers) if layer in chosen_layers[:k]]
    if twice:
        raise InputError(f"layers names {twice[0]!r} twice; its scores would count double")
    names = {layer.name for layer in chosen_layers}
    ordered = [layer for name, layer in linear_layers(model).items() if name in names]
    out = capture_layers(
        model,
        loader,
        ordered,
        ignore_index=ignore_index,
        shift=shift_labels,
        output=output,
        progress=progress,
    )
    return out[0] if single else out
