"""K-FAC of the layers before the head, as sums over samples, chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from imu_fast.errors import InputError
from imu_fast.model.batches import Reread
from imu_fast.model.called import from_sample
from imu_fast.model.capture import capture
from imu_fast.model.convolution import Convolution, scored_layers
from imu_fast.model.head import LinearLayer, shared_with
from imu_fast.model.parts import Parts
from imu_fast.model.reading import Reading
from imu_fast.model.selection import selected
from imu_fast.unlearning.summary.hessian import KroneckerHessian

logger = logging.getLogger("imu_fast")

# Of "auto": so many layers before the head at most, whose matrices take no more than this.
INNER_LAYERS, INNER_BYTES = 3, 100_000_000
# Up to so many classes the expectation over the model's labels is exact, beyond one draw.
EXACT_CLASSES = 32
# Samples whose signals at inner layers exist at once.
_SAMPLES = 256

Inner = dict[str, KroneckerHessian]


def why_not(model: nn.Module, layer: LinearLayer) -> str:
    """Why a step of the layer's matrix cannot be its weight's; empty if it can."""
    if layer.groups != 1 or (isinstance(layer, Convolution) and layer.is_transposed):
        return f"is a grouped or transposed {layer.kind}"
    if layer.derived:
        return "has a weight that is made of others"
    if tied := shared_with(model, layer):
        return f"shares its weight with {', '.join(tied)}"
    if not layer.module.weight.is_floating_point():  # type: ignore[operator]
        return f"has a weight of {layer.module.weight.dtype}"
    return ""


def _nbytes(layer: LinearLayer) -> int:
    return int(8 * (layer.width**2 + layer.matrix.shape[1] ** 2))


def inner_layers(model: nn.Module, wanted: Any, head: Sequence[str]) -> list[LinearLayer]:
    """Linear layers and convolutions other than the head, in module order.

    Args:
        wanted: ``"auto"``: the last ``INNER_LAYERS`` before the head whose matrices fit into
            ``INNER_BYTES``; names, modules or patterns, as ``layers`` of :func:`imu_fast.capture`;
            None: none. head: the head's names, which are left out.

    Raises:
        InputError: no layer fits what is wanted, or one whose weight cannot be stepped.
    """
    if wanted is None:
        return []
    if isinstance(wanted, str) and wanted == "auto":
        found: list[LinearLayer] = []
        size = 0
        before = list(scored_layers(model).values())
        heads = [place for place, layer in enumerate(before) if layer.name in head]
        for layer in reversed(before[: min(heads, default=len(before))]):
            size += _nbytes(layer)
            if len(found) == INNER_LAYERS or size > INNER_BYTES:
                break
            if not why_not(model, layer):
                found.insert(0, layer)
        return found
    chosen = [layer for layer in selected(model, wanted)[0] if layer.name not in head]
    for layer in chosen:
        if why := why_not(model, layer):
            raise InputError(
                f"layer {layer.name!r} {why}, so a step of its matrix is none of its weight; "
                "leave it out"
            )
    return chosen


def inner_hessians(
    model: nn.Module, batches: Iterable[Parts], names: Sequence[str], reading: Reading, classes: int
) -> Inner:
    """The undamped K-FAC sums over samples at these layers, by name.

    ``_SAMPLES`` samples go through the model at a time, so memory does not grow with the data: the
    inputs and signals of these samples, and the matrices.

    Args:
        classes: C; the expectation over the model's labels is exact up to 32 of them, beyond that
            of one draw.
    """
    found: Inner = {}
    fisher: Any = "exact" if classes <= EXACT_CLASSES else "sampled"
    for start, chunk in chunks_of(batches if names else (), _SAMPLES):
        with from_sample(start):
            captured = capture(model, chunk, list(names), fisher=fisher, **reading.given())
        for factors in captured if isinstance(captured, list) else [captured]:
            part = KroneckerHessian.of_layer(factors)
            found[factors.name] = found[factors.name] + part if factors.name in found else part
    return found


def capturable(
    model: nn.Module, layers: Sequence[LinearLayer], batch: Parts, reading: Reading, classes: int
) -> list[LinearLayer]:
    """Those that run, and whose rows are each of one sample of the batch; others are said."""
    found = []
    for layer in layers:
        try:
            inner_hessians(model, [batch], [layer.name], reading, classes)
        except InputError as error:
            logger.warning("layer %r is left out: %s", layer.name, error)
        else:
            found.append(layer)
    return found


def chunks_of(batches: Iterable[Parts], samples: int) -> Iterator[tuple[int, Reread]]:
    """Batches in runs of at least so many samples, each with the place of its first sample."""
    kept: list[Parts] = []
    start = size = 0
    for batch in batches:
        kept.append(batch)
        size += batch.n
        if size >= samples:
            yield start, _reread(kept)
            start, size, kept = start + size, 0, []
    if kept:
        yield start, _reread(kept)


def _reread(batches: list[Parts]) -> Reread:
    return Reread(lambda: iter(batches))


def without_signal(inner: Inner) -> list[str]:
    """Layers that no sample's loss depends on."""
    return [name for name, hessian in inner.items() if not hessian.trace() > 0]
