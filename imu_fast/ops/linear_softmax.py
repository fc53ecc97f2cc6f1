"""The softmax of a large-vocabulary head from features and weight, no ``[N, C]`` logits stored.

Two sweeps over slabs of the vocabulary: the first finds each token's log-sum-exp by an online
softmax, the second forms ``delta[:, slab]``, to be used and discarded. What exists at once is
``N x slab``; FLOPs are 2 N C d for each sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation

# Classes at once: the logits' slab is 32 MB at 2,048 tokens in float32.
SLAB = 4096


class Head(NamedTuple):
    """Operands of a head: features [N, d], weight [C, d], bias [C] or None, labels [N], scale [N].

    A negative label is ignored: its token has no gradient and no loss. scale >= 0; None means 1.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: Tensor | None = None


class Normaliser(NamedTuple):
    """What a token needs before its residual can be formed class by class.

    lse [N]: log-sum-exp of its logits. others [N]: ``1 - p_y`` as the sum of the other
    probabilities, without cancellation. loss [N]: scaled cross-entropy.
    """

    lse: Tensor
    others: Tensor
    loss: Tensor


def _slabs(classes: int, slab: int) -> Iterator[slice]:
    for start in range(0, classes, slab):
        yield slice(start, min(classes, start + slab))


def _compute_dtype(head: Head) -> torch.dtype:
    return torch.float64 if head.features.dtype == torch.float64 else torch.float32


def _logits(head: Head, slab: slice, dtype: torch.dtype) -> Tensor:
    """``z[:, slab]``, [N, slab]; half precision is converted slab by slab."""
    bias = None if head.bias is None else head.bias[slab].to(dtype)
    weight = head.weight[slab].to(dtype)
    return torch.nn.functional.linear(head.features.to(dtype), weight, bias)


def _token_scale(head: Head, dtype: torch.dtype) -> Tensor:
    valid = (head.labels >= 0).to(dtype)
    return valid if head.scale is None else valid * head.scale.to(dtype)


def _decide(head: Head, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return head.features, head.weight


def _normaliser_limits(head: Head, slab: int = SLAB) -> str:
    return kernel_dtypes(head.features, head.weight)


def _launch_normaliser(head: Head, slab: int = SLAB, *, precision: str) -> Normaliser:
    from imu_fast.kernels import linear_softmax as kernel

    return Normaliser(*kernel.normaliser(*head, precision))


def _define_normaliser(reference: ModuleType, head: Head, slab: int = SLAB) -> Normaliser:
    found = reference.linear_softmax_normaliser(head)
    return Normaliser(*(t.to(_compute_dtype(head)) for t in found))


@operation(
    name="linear_softmax_normaliser",
    reference=_define_normaliser,
    kernel=_launch_normaliser,
    limits=_normaliser_limits,
    products=PRODUCTS,
    decide=_decide,
)
def normaliser(head: Head, slab: int = SLAB) -> Normaliser:
    """The first sweep: log-sum-exp, ``1 - p_y`` and loss of every token, online over slabs.

    Args:
        head: features [N, d], weight [C, d], bias [C] or None, labels [N], scale [N] or None.
        slab: classes at once; the kernel chooses for itself.

    Returns:
        lse, others and loss, each [N], float64 for float64 features, else float32.
    """
    dtype = _compute_dtype(head)
    size, device = len(head.features), head.features.device
    largest = torch.full((size,), -torch.inf, dtype=dtype, device=device)
    others = torch.zeros(size, dtype=dtype, device=device)
    label_logit = torch.full_like(largest, -torch.inf)
    for piece in _slabs(len(head.weight), slab):
        z = _logits(head, piece, dtype)
        local = head.labels - piece.start
        rows = torch.nonzero((local >= 0) & (local < z.shape[1]))[:, 0]
        column = local[rows]
        label_logit[rows] = z[rows, column]
        new = torch.maximum(largest, z.amax(dim=1))
        z.sub_(new[:, None]).exp_()
        z[rows, column] = 0.0
        others = others * torch.exp(largest - new) + z.sum(dim=1)
        largest = new
    total = others + torch.exp(label_logit - largest)
    lse, others = largest + total.log(), others / total
    loss = torch.where(others < 0.5, -torch.log1p(-others), lse - label_logit)
    scale = _token_scale(head, dtype)
    return Normaliser(lse, others, torch.where(scale > 0, loss * scale, 0.0))


def _residual_limits(head: Head, known: Normaliser, classes: slice) -> str:
    return kernel_dtypes(head.features, head.weight)


def _launch_residual(head: Head, known: Normaliser, classes: slice, precision: str) -> Tensor:
    from imu_fast.kernels import linear_softmax as kernel

    bias = None if head.bias is None else head.bias[classes]
    scale = _token_scale(head, _compute_dtype(head))
    part = (head.features, head.weight[classes], bias, head.labels, scale)
    return kernel.residual(*part, known.lse, known.others, classes.start, precision)


def _define_residual(
    reference: ModuleType, head: Head, known: Normaliser, classes: slice
) -> Tensor:
    delta: Tensor = reference.linear_softmax_residual(head, known.lse, known.others)[:, classes]
    return delta.to(_compute_dtype(head))


@operation(
    name="linear_softmax_residual",
    reference=_define_residual,
    kernel=_launch_residual,
    limits=_residual_limits,
    products=PRODUCTS,
    decide=_decide,
)
def residual(head: Head, known: Normaliser, classes: slice) -> Tensor:
    """``delta[:, classes]``, [N, slab], of what the first sweep found.

    ``c e^{z - lse}`` is ``e^{z + b}`` with ``b = log c - lse``, which the product starts from.

    Args:
        head: as of the first sweep, or a part of its classes: a label that is none of them is
            their number or more. known: what the sweep over all found. classes: ``start:stop``.

    Returns:
        [N, stop - start], float64 for float64 features, else float32.
    """
    dtype = _compute_dtype(head)
    scale = _token_scale(head, dtype)
    start = (scale.log() - known.lse)[:, None]
    if head.bias is None:
        delta = start.repeat(1, classes.stop - classes.start)
    else:
        delta = start + head.bias[classes].to(dtype)
    delta.addmm_(head.features.to(dtype), head.weight[classes].to(dtype).t()).exp_()
    local = head.labels - classes.start
    rows = torch.nonzero((local >= 0) & (local < delta.shape[1]))[:, 0]
    delta[rows, local[rows]] = -known.others[rows] * scale[rows]
    return delta
