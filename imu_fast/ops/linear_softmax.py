"""A large-vocabulary head, features and weight to scores, without ever storing ``[N, C]`` logits.

Two sweeps over slabs of the vocabulary: the first finds each token's log-sum-exp by an online
softmax, the second forms ``delta[:, slab]``, uses it and discards it. What exists at once is
``N x slab`` and a few ``slab x D``; FLOPs are 2 N C D for each sweep and product.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from imu_fast.backend import input_precision
from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.mean_gradient import mean_gradient
from imu_fast.ops.operation import kernel_dtypes, operation

# Classes at once: delta's slab is 128 MB at 8,192 tokens in float32, and X's at D = 4,096 64 MB.
SLAB = 4096


class Head(NamedTuple):
    """Operands of a head: features [N, d], weight [C, d], bias [C] or None, labels [N], scale [N].

    A negative label is ignored: its token has no gradient and no loss. scale None means 1.
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


def _normaliser_limits(head: Head, slab: int = SLAB) -> str:
    return kernel_dtypes(head.features, head.weight)


def _launch_normaliser(head: Head, slab: int = SLAB) -> Normaliser:
    from imu_fast.kernels import linear_softmax as kernel

    return Normaliser(*kernel.normaliser(*head, input_precision()))


def _define_normaliser(reference: ModuleType, head: Head, slab: int = SLAB) -> Normaliser:
    found = reference.linear_softmax_normaliser(head)
    return Normaliser(*(t.to(_compute_dtype(head)) for t in found))


@operation(
    name="linear_softmax_normaliser",
    reference=_define_normaliser,
    kernel=_launch_normaliser,
    limits=_normaliser_limits,
)
def normaliser(head: Head, slab: int = SLAB) -> Normaliser:
    """The first sweep: log-sum-exp, ``1 - p_y`` and loss of every token, online over slabs."""
    dtype = _compute_dtype(head)
    size, device = len(head.features), head.features.device
    largest = torch.full((size,), -torch.inf, dtype=dtype, device=device)
    others = torch.zeros(size, dtype=dtype, device=device)
    label_logit = torch.full_like(largest, -torch.inf)
    for piece in _slabs(len(head.weight), slab):
        z = _logits(head, piece, dtype)
        local = head.labels - piece.start
        inside = (local >= 0) & (local < z.shape[1])
        column = local.clamp(0, z.shape[1] - 1)[:, None]
        at_label = z.gather(1, column)[:, 0]
        label_logit = torch.where(inside, at_label, label_logit)
        new = torch.maximum(largest, z.amax(dim=1))
        z.sub_(new[:, None]).exp_()
        z.scatter_(1, column, torch.where(inside[:, None], 0.0, z.gather(1, column)))
        others = others * torch.exp(largest - new) + z.sum(dim=1)
        largest = new
    total = others + torch.exp(label_logit - largest)
    lse, others = largest + total.log(), others / total
    loss = torch.where(others < 0.5, -torch.log1p(-others), lse - label_logit)
    scale = _token_scale(head, dtype)
    return Normaliser(lse, others, torch.where(scale > 0, loss * scale, 0.0))


def _residual_limits(head: Head, known: Normaliser, classes: slice) -> str:
    return kernel_dtypes(head.features, head.weight)


def _launch_residual(head: Head, known: Normaliser, classes: slice) -> Tensor:
    from imu_fast.kernels import linear_softmax as kernel

    bias = None if head.bias is None else head.bias[classes]
    scale = _token_scale(head, _compute_dtype(head))
    part = (head.features, head.weight[classes], bias, head.labels, scale)
    return kernel.residual(*part, known.lse, known.others, classes.start, input_precision())


def _define_residual(
    reference: ModuleType, head: Head, known: Normaliser, classes: slice
) -> Tensor:
    delta: Tensor = reference.linear_softmax_residual(head)[0][:, classes]
    return delta.to(_compute_dtype(head))


@operation(
    name="linear_softmax_residual",
    reference=_define_residual,
    kernel=_launch_residual,
    limits=_residual_limits,
)
def residual(head: Head, known: Normaliser, classes: slice) -> Tensor:
    """``delta[:, classes]``, [N, slab], of what the first sweep found."""
    dtype = _compute_dtype(head)
    delta = _logits(head, classes, dtype).sub_(known.lse[:, None]).exp_()
    local = head.labels - classes.start
    rows = torch.nonzero((local >= 0) & (local < delta.shape[1]))[:, 0]
    delta[rows, local[rows]] = -known.others[rows]
    return delta.mul_(_token_scale(head, dtype)[:, None])


def residual_slabs(
    head: Head, known: Normaliser, slab: int = SLAB
) -> Iterator[tuple[slice, Tensor]]:
    """The second sweep: ``(classes, delta[:, classes])``, each to be used and discarded."""
    for piece in _slabs(len(head.weight), slab):
        yield piece, residual(head, known, piece)


def linear_softmax_gradients(
    head: Head, offsets: Tensor, slab: int = SLAB
) -> tuple[Tensor, Tensor]:
    """The mean gradient and the Fisher diagonal, both [C, D], of one pair of sweeps."""
    has_bias, known = head.bias is not None, normaliser(head, slab)
    shape = len(head.weight), head.features.shape[1] + has_bias
    mean = torch.empty(shape, dtype=_compute_dtype(head), device=head.features.device)
    fisher = torch.empty_like(mean)
    act = head.features.to(mean.dtype)
    for piece, delta in residual_slabs(head, known, slab):
        mean[piece] = mean_gradient(delta, act, offsets, has_bias)
        fisher[piece] = fisher_diagonal(delta, act, offsets, has_bias)
    return mean, fisher


def linear_softmax_bilinear(head: Head, x: Tensor, offsets: Tensor, slab: int = SLAB) -> Tensor:
    """``<g_i, X>`` for a given X [C, D] (or several, [m, C, D]): [n] (or [n, m])."""
    act = head.features.to(_compute_dtype(head))
    total: Tensor | None = None
    for piece, delta in residual_slabs(head, normaliser(head, slab), slab):
        part = bilinear_scores(
            delta, act, x[..., piece, :].to(act.dtype), offsets, head.bias is not None
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def linear_softmax_scores(
    head: Head, offsets: Tensor, damping: float, damping_mode: str = "add", slab: int = SLAB
) -> tuple[Tensor, Tensor]:
    """Influence under the diagonal Fisher of the mean gradient, and the loss, of each sample.

    ``influence_i = - <g_i, gbar / (F + lam)>`` separates over classes once the log-sum-exp of each
    token is known, so F, gbar and X exist for one slab of classes at a time.

    Args:
        offsets: [n+1], which tokens belong to which sample. damping: lam.
        damping_mode: "add" (``F + lam``) or "clamp" (``max(F, lam)``).

    Returns:
        scores [n], and losses of the tokens [N].
    """
    has_bias, known = head.bias is not None, normaliser(head, slab)
    act = head.features.to(known.lse.dtype)
    scores = act.new_zeros(len(offsets) - 1)
    for _, delta in residual_slabs(head, known, slab):
        curvature = fisher_diagonal(delta, act, offsets, has_bias)
        if damping_mode == "add":
            curvature.add_(damping)
        else:
            curvature.clamp_(min=damping)
        x = mean_gradient(delta, act, offsets, has_bias).div_(curvature)
        scores.sub_(bilinear_scores(delta, act, x, offsets, has_bias))
    return scores, known.loss
