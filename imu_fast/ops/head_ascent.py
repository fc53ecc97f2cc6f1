"""Reweighted ascent steps at a softmax head on cached features, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.ops.extension import SUFFIX, loaded_for, threads_for, written
from imu_fast.ops.mean_gradient import add_gradients
from imu_fast.ops.objective import objective, objective_residual
from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation
from imu_fast.ops.softmax_residual import linear_logits, softmax_residual

# Up to so many classes the compiled loop is no slower than two products of torch's on a copy of the
# samples, alone; beyond, it lacks the packing of a large product.
_FEW_CLASSES = 1024
# Multiply-adds of one product beside a number of an elementwise loop.
_PRODUCTS_A_NUMBER = 16


def head_logits(features: Tensor, theta: Tensor, has_bias: bool) -> Tensor:
    """``a~ @ theta.T`` without storing a~, in theta's dtype: [B, d] and [C, D] to [B, C]."""
    d, features = features.shape[1], features.to(theta.dtype)
    return torch.nn.functional.linear(features, theta[:, :d], theta[:, d] if has_bias else None)


def _decide(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    return features, theta


def _check_shapes(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    has_bias: bool,
    rows: Tensor | None,
    buffer: Tensor | None = None,
    *,
    steps: bool = False,
) -> None:
    """Raise InputError unless these fit: torch takes some others, and a compiled loop any.

    Args:
        steps: whether ``rows`` may be those of several.
    """
    samples, named = (labels, "labels") if rows is None else (rows, "rows")
    wanted = {
        "theta": (theta, (*theta.shape[:1], features.shape[-1] + has_bias)),
        "labels": (labels, features.shape[:1]),
        "weights": (weights, samples.shape),
        "buffer": (theta if buffer is None else buffer, theta.shape),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise InputError(
                f"{name} has shape {[*tensor.shape]} where {[*shape]} fits features "
                f"{[*features.shape]}, theta {[*theta.shape]}, {named} {[*samples.shape]} and "
                f"has_bias={has_bias}"
            )
    if features.ndim != 2 or not 1 <= samples.ndim <= 1 + steps:
        raise InputError(
            f"features {[*features.shape]} and {named} {[*samples.shape]} must be [n, d] and [B]"
            + (" or [k, B]" if steps else "")
        )


def _chosen(features: Tensor, labels: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    if rows is None:
        return features, labels
    return features.index_select(0, rows), labels.index_select(0, rows)


def _gradient_by_definition(
    reference: ModuleType,
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    has_bias: bool,
    *rest: Any,
    rows: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    _check_shapes(features, labels, weights, theta, has_bias, rows)
    operands = (*_chosen(features, labels, rows), weights, theta, has_bias, *rest)
    gradient, loss = reference.head_ascent_gradient(*operands, **named)
    return gradient.to(theta.dtype), loss.to(theta.dtype)


@operation(reference=_gradient_by_definition, products=PRODUCTS, decide=_decide)
def head_ascent_gradient(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    has_bias: bool,
    name: str,
    auxiliary: Tensor | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``- sum_i w_i f(l_i) / sum_i w_i`` for the head, and that loss.

    On a CPU the cross-entropy of a few classes is one pass of a compiled loop
    (``csrc/head_ascent.cpp``): it copies no sample, and makes neither logits nor residual.

    Args:
        features: [n, d]. labels: [n]. weights: [B], positive. theta: [C, D] as ``[W, b]``.
        has_bias: whether there is a b.
        name, auxiliary [B]: see :func:`imu_fast.ops.objective.objective`.
        rows: [B] int64, which of the n samples; None: all, and B = n.

    Returns:
        gradient [C, D], and the loss as a scalar tensor (no host synchronisation).

    Raises:
        InputError: shapes that do not fit; or, of the compiled loop, a row or a label that is none.
    """
    _check_shapes(features, labels, weights, theta, has_bias, rows)
    share = weights / -weights.sum()
    if name == "ce" and _is_plain(features, labels, share, theta, rows):
        gradient, loss = torch.empty_like(theta), theta.new_empty(())
        head = (features, labels, theta, has_bias, rows)
        _by_extension("head_gradient", *head, share, gradient, loss)
        return gradient, loss
    features, labels = _chosen(features, labels, rows)
    features, d = features.to(theta.dtype), features.shape[1]
    logits = linear_logits(features, theta[:, :d], theta[:, d] if has_bias else None)
    if name == "ce":  # the residual comes with its loss
        # On a CPU without the dispatch and the checks of an operation within an operation.
        run = softmax_residual.body if logits.is_cpu else softmax_residual
        residual, losses = run(logits, labels, share)
        loss = losses.sum()
    else:
        loss = (share * objective(logits, labels, name, auxiliary)).sum()
        residual = objective_residual(logits, labels, name, auxiliary).mul_(share[:, None])
    gradient = torch.empty_like(theta)
    return add_gradients(gradient, residual, features, has_bias, beta=0.0, alpha=1.0), loss


def _is_plain(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, rows: Tensor | None
) -> bool:
    """Whether the compiled loop is there, is the faster one, and reads these as they lie."""
    dtype, adjacent = theta.dtype, features.stride(-1) == theta.stride(-1) == 1
    adjacent = adjacent and theta.stride(0) >= theta.shape[1]  # torch says what is amiss of others
    operands = (features, weights, labels) if rows is None else (features, weights, labels, rows)
    fits = features.dtype == weights.dtype == dtype and labels.dtype == torch.int64
    fits = fits and (rows is None or rows.dtype == torch.int64) and adjacent and weights.numel() > 0
    there = all(tensor.is_cpu for tensor in operands) and loaded_for(theta) is not None
    return fits and there and len(theta) <= _FEW_CLASSES


def _by_extension(
    name: str,
    features: Tensor,
    labels: Tensor,
    theta: Tensor,
    has_bias: bool,
    rows: Tensor | None,
    weights: Tensor,
    *more: Any,
) -> None:
    """Call the compiled ``name`` of a head, with what it takes beside."""
    classes, n, d = len(theta), weights.shape[-1], theta.shape[1] - has_bias
    labels, weights = labels.contiguous(), weights.contiguous()
    rows = None if rows is None else rows.contiguous()
    wrong = getattr(loaded_for(theta), f"{name}_{SUFFIX[theta.dtype]}")(
        (features.data_ptr(), features.stride(0)),
        labels.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        (theta.data_ptr(), theta.stride(0)),
        (len(features), n, classes, d),
        has_bias,
        weights.data_ptr(),
        *(m.data_ptr() if isinstance(m, Tensor) else m for m in more),
        threads_for(n * d * classes // _PRODUCTS_A_NUMBER),
    )
    if wrong >= 0:
        at = wrong if rows is None else int(rows.flatten()[wrong])
        if not 0 <= at < len(labels):
            raise InputError(f"rows[{wrong}]={at} is out of range; there are {len(labels)} samples")
        raise InputError(
            f"labels[{at}]={int(labels[at])} is out of range; classes are 0 to {classes - 1}"
        )


def _kernel_limits(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, *_: Any, **__: Any
) -> str:
    exact = theta.dtype == torch.float32
    wide = "" if exact else f"theta is {theta.dtype}; the kernel updates float32"
    return kernel_dtypes(features) or wide


def _launch(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    has_bias: bool,
    name: str,
    *,
    precision: str,
    rows: Tensor | None = None,
    **rates: float,
) -> Tensor:
    from imu_fast.kernels import head_ascent as kernel

    _check_shapes(features, labels, weights, theta, has_bias, rows, buffer, steps=True)
    rates = {key: float(rate) for key, rate in rates.items()}

    def step(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits, share = head_logits(features, theta, has_bias), weights / weights.sum()
        operands = (logits, features, labels, share, theta, buffer, has_bias, name)
        return kernel.head_ascent(*operands, **rates, precision=precision)

    written(theta, buffer)
    return _one_by_one(step, features, labels, weights, rows)


def _by_definition(
    reference: ModuleType,
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    has_bias: bool,
    *rest: Any,
    rows: Tensor | None = None,
    **rates: float,
) -> Tensor:
    _check_shapes(features, labels, weights, theta, has_bias, rows, buffer, steps=True)

    def step(*batch: Tensor) -> Tensor:
        new_theta, new_buffer, loss = reference.head_ascent(
            *batch, theta, buffer, has_bias, *rest, **rates
        )
        theta.copy_(new_theta)
        if buffer is not None:
            buffer.copy_(new_buffer)
        return loss.to(theta.dtype)

    return _one_by_one(step, features, labels, weights, rows)


def _one_by_one(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """The losses of ``step`` on the chosen features, labels and weights of each step."""
    if rows is None or rows.ndim == 1:
        return step(*_chosen(features, labels, rows), weights)
    steps = zip(rows, weights, strict=True)
    return torch.stack([step(*_chosen(features, labels, r), w) for r, w in steps])


# A small share of a weighted residual keeps its bits: none of the step is rounded to bfloat16.
_KERNEL_HAS = ("ieee", "tf32x3", "tf32")


@operation(
    reference=_by_definition,
    kernel=_launch,
    limits=_kernel_limits,
    products=_KERNEL_HAS,
    decide=_decide,
)
def head_ascent(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    has_bias: bool,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Steps of SGD on ``- sum_i w_i f(l_i) / sum_i w_i + alpha ||theta||_1``, in place.

    With g its gradient, ``buffer <- momentum buffer + g + weight_decay theta`` and
    ``theta <- theta - lr buffer``, as torch.optim.SGD does (no dampening, no Nesterov). On a CPU
    steps of the cross-entropy of a few classes are one call of a compiled loop
    (``csrc/head_ascent.cpp``).

    Args:
        features: [n, d]; half precision is multiplied in theta's dtype. labels: [n].
        weights: [B], positive. theta: [C, D] as ``[W, b]``, adjacent columns; changed.
        buffer: [C, D], zeros before the first step, changed; None without momentum.
        has_bias: whether there is a b. name: one of ``LABEL_OBJECTIVES``.
        lr, momentum, weight_decay, alpha: as above, 0 or more.
        rows: [B] int64, which of the n samples; None: all, and B = n. Of k steps, one after the
            other: [k, B], with weights [k, B].

    Returns:
        the loss before the step, as a scalar tensor (no host synchronisation); of k steps [k].

    Raises:
        InputError: as :func:`head_ascent_gradient`; nothing is changed then.
    """
    rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "alpha": alpha}
    _check_shapes(features, labels, weights, theta, has_bias, rows, buffer, steps=True)
    plain = buffer is None or (buffer.is_contiguous() and buffer.dtype == theta.dtype)
    if name == "ce" and plain and _is_plain(features, labels, weights, theta, rows):
        losses = weights.new_empty(weights.shape[:-1])
        head = (features, labels, theta, has_bias, rows)
        plan = (losses.numel(), tuple(map(float, rates.values())))
        _by_extension("head_ascent", *head, weights, *plan, 0 if buffer is None else buffer, losses)
        written(theta, buffer)
        return losses

    def step(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        # Without the dispatch and the checks of an operation within an operation.
        batch = (features, labels, weights, theta, has_bias, name)
        gradient, loss = head_ascent_gradient.body(*batch)
        return _sgd(gradient, loss, theta, buffer, **rates)

    return _one_by_one(step, features, labels, weights, rows)


def _sgd(
    step: Tensor,
    loss: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
) -> Tensor:
    """Change theta and its buffer by a gradient, which is changed too; returns the loss."""
    if alpha:
        step.add_(theta.sign(), alpha=alpha)
        loss = loss + alpha * theta.abs().sum()
    if weight_decay:
        step.add_(theta, alpha=weight_decay)
    if buffer is not None:
        step = buffer.mul_(momentum).add_(step)
    theta.add_(step, alpha=-lr)
    return loss
