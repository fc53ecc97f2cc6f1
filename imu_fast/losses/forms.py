"""Every form in which the curvature of a loss is kept beside delta."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from imu_fast.errors import InputError, check_same_device
from imu_fast.losses.base import mean_scale
from imu_fast.losses.output_curvature import (
    Dense,
    Diagonal,
    LabelSoftmax,
    OutputCurvature,
    Softmax,
    StoredCurvature,
)
from imu_fast.losses.signals import KINDS, GroupedRows, Signals

_HEADS: tuple[type[StoredCurvature], ...] = (
    Softmax,
    LabelSoftmax,
    Diagonal,
    Dense,
    GroupedRows,
)
FORMS: dict[str, type[StoredCurvature]] = {kind.form: kind for kind in (*_HEADS, *KINDS.values())}


def curvature_like(given: StoredCurvature | Tensor, delta: Tensor) -> StoredCurvature:
    """Raise InputError unless it is one of delta's tokens and outputs."""
    if isinstance(given, Tensor):
        dense = given.dim() == 3
        given = OutputCurvature.dense(given) if dense else OutputCurvature.diagonal_of(given)
    if not isinstance(given, StoredCurvature):
        raise InputError(
            f"curvature is a {type(given).__name__}; pass an imu.OutputCurvature, or a tensor "
            "[N, C, C], or [N, C] for a diagonal"
        )
    count, classes = delta.shape
    for name, tensor in given.tensors().items():
        axes = tensor.shape[2:] if isinstance(given, Signals) else tensor.shape[1:]
        if tensor.shape[0] != count or any(k != classes for k in axes):
            raise InputError(
                f"curvature has {name} {tuple(tensor.shape)}, delta is {tuple(delta.shape)}; "
                "expected those of its tokens and outputs"
            )
        check_same_device("delta", delta, f"the curvature's {name}", tensor)
    return given


def joined_curvature(
    found: Sequence[StoredCurvature | None],
    deltas: Sequence[Tensor],
    labels: Sequence[Tensor],
    counts: Sequence[Tensor],
) -> StoredCurvature | None:
    """Of several batches of one loss, one after the other; None where one has none.

    Where labels are class indices in some and probabilities in others, in the form of the latter.

    Args:
        deltas, labels: [N, C] and [N] or [N, C], of each batch's tokens. counts: [n], of its
            samples.
    """
    parts = []
    for one, delta, of, tokens in zip(found, deltas, labels, counts, strict=True):
        if one is None:
            return None
        several = len({type(other) for other in found}) > 1
        mixed = several and isinstance(one, LabelSoftmax)
        parts.append(one.resolved(delta, of, mean_scale(tokens).to(delta)) if mixed else one)
    return type(parts[0]).joined(parts)
