"""What rounding can do to each result, at most: from the operands in float64, entry by entry.

A sum of k terms, in any order, is off by at most ``k u / (1 - k u)`` times the sum of the terms'
magnitudes, u the unit roundoff of the arithmetic (Higham, Accuracy and Stability, section 4.2).
Here every k is a little larger than the operation's, for the roundings beside its sums, and the
magnitudes are the same operation of absolute values. A function gives, for each result, the
:class:`Bound`: so many u (``rounded``), what is multiplied in a lower precision (``cut``), in units
of what an operand is rounded by there (``imu_fast.precision.ROUNDING``), and what the definition's
own float64 is off by beyond it (``definition``).
Of softmaxes ``e^(z - m)`` has a relative error of ``|z - m|`` u and more: its argument is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imu_fast import reference
from imu_fast.check import plain


class Bound(NamedTuple):
    """Of one result: magnitudes in units of the roundoff, of operands' rounding, of float64's."""

    rounded: Tensor
    cut: Tensor | float = 0.0
    definition: Tensor | float = 0.0


# Roundings of an exponential (three ulp), and of the few steps beside a softmax's sum.
_EXP = 16
Bounds = Callable[..., list[Bound]]


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max())


def _size(name: str, *operands: Any) -> Tensor:
    """The operation of absolute values. None cancel, so that either form is exact enough."""
    sets = [x[2] for x in operands[:2] if isinstance(x, tuple)] or [operands[-2]]
    flat = all(bool((offsets.diff() == 1).all()) for offsets in sets)
    found: Tensor = getattr(plain if flat else reference, name)(*_absolute(operands))
    return found


def _residual(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``|softmax(z) - onehot(y)|`` [N, C] and the loss [N], in float64."""
    column = labels[:, None]
    p = torch.softmax(z, dim=1).scatter(1, column, 0.0)
    others = p.sum(dim=1)
    far = z.logsumexp(dim=1) - z.gather(1, column)[:, 0]
    return p.scatter(1, column, others[:, None]), torch.where(
        others < 0.5, -torch.log1p(-others), far
    )


def mean_gradient(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> list[Bound]:
    size = _size("mean_gradient", delta, act, offsets, has_bias)
    return [Bound((len(delta) + 4) * size, 2 * size)]


def fisher_diagonal(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> list[Bound]:
    """A square has twice its root's relative error."""
    size = _size("fisher_diagonal", delta, act, offsets, has_bias)
    return [Bound((len(offsets) + 2 * _longest(offsets) + 6) * size, 4 * size)]


def bilinear_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> list[Bound]:
    size = _size("bilinear_scores", delta, act, x, offsets, has_bias)
    length = delta.shape[1] + x.shape[-1] + _longest(offsets)
    return [Bound((length + 6) * size, 2 * size)]


def quadratic_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> list[Bound]:
    """Of one token a sum of sums; of several of all C D squares."""
    size = _size("quadratic_scores", delta, act, x, offsets, has_bias)
    (classes, width), longest = x.shape, _longest(offsets)
    length = classes + width if longest == 1 else classes * width + 2 * longest
    return [Bound((length + 8) * size, 4 * size)]


def gradient_norms(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> list[Bound]:
    ones = delta.new_ones(delta.shape[1], act.shape[1] + has_bias)
    return quadratic_scores(delta, act, ones, offsets, has_bias)


def gram(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> list[Bound]:
    return cross_gram((delta, act, offsets), (delta, act, offsets), has_bias)


def cross_gram(left: tuple[Tensor, ...], right: tuple[Tensor, ...], has_bias: bool) -> list[Bound]:
    size = _size("cross_gram", left, right, has_bias)
    length = left[0].shape[1] + left[1].shape[1] + _longest(left[2]) * _longest(right[2])
    return [Bound((length + 8) * size, 4 * size)]


def ggn_product(
    p: Tensor, scale: Tensor, act: Tensor, v: Tensor, n: int, damping: float, has_bias: bool
) -> list[Bound]:
    """``s = c p (u' - p.u')``, u' relative to the likeliest class: up to |u| + |u_top|."""
    act, many = reference.augment(act.abs(), has_bias), v if v.dim() == 3 else v[None]
    sizes = []
    for x in many.abs():
        u = act @ x.T
        u = u + u.gather(1, p.argmax(dim=1, keepdim=True))
        s = scale[:, None] * p * (u + (p * u).sum(dim=1, keepdim=True))
        sizes.append(s.T @ act / n)
    size = torch.stack(sizes).view(v.shape)
    length = len(p) + p.shape[1] + act.shape[1]
    return [Bound((length + 16) * size + 4 * damping * v.abs(), 4 * size)]


class _Softmax(NamedTuple):
    """Of logits [N, C] in float64: how far apart they are, and what rounds in a softmax of them."""

    spread: Tensor  # [N, 1]: max - min
    largest: Tensor  # [N]: max |z|
    relative: Tensor  # [N, 1]: of each probability, in u


def _softmax(z: Tensor, logit_error: Tensor | float = 0.0) -> _Softmax:
    """logit_error [N, 1]: of each z, in u; both of a ratio's terms have it."""
    top, low = z.amax(dim=1, keepdim=True), z.amin(dim=1, keepdim=True)
    relative = 2 * logit_error + z.shape[1] + 2 * (top - low) + _EXP
    return _Softmax(top - low, z.abs().amax(dim=1), relative)


def _loss(loss: Tensor, known: _Softmax) -> Tensor:
    """Of an unscaled loss [N]: ``-log1p(-others)`` where p_y > 1/2, else out of the logits."""
    relative = known.relative[:, 0]
    return torch.where(loss < 0.69, 2 * relative * loss, relative + 4 * (known.largest + loss))


def softmax_residual(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> list[Bound]:
    known, ones = _softmax(logits), torch.ones_like(logits[:, 0])
    delta, loss = _residual(logits, labels)
    c = ones if scale is None else scale
    return [
        Bound(known.relative * delta * c[:, None]),
        Bound(_loss(loss, known) * c),
    ]


def _head(head: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Logits [N, C] of a head, and the largest ``|a| . |w_j| + |b_j|`` of a token [N, 1]."""
    features, weight, bias = head[:3]
    size = reference.head_logits(features.abs(), weight.abs(), None if bias is None else bias.abs())
    return reference.head_logits(features, weight, bias), size.amax(dim=1, keepdim=True)


def linear_softmax_normaliser(head: tuple[Any, ...]) -> list[Bound]:
    z, size = _head(head)
    known = _softmax(z, (head[0].shape[1] + 3) * size)
    ones = torch.ones_like(z[:, 0])
    _, loss = _residual(z, head[3])
    c = ones if head[4] is None else head[4]
    others, flat = -torch.expm1(-loss), size[:, 0]
    return [
        Bound(known.relative[:, 0] + 4 * known.largest, 2 * flat),
        Bound(2 * known.relative[:, 0] * others, 8 * flat * others),
        Bound(2 * _loss(loss, known) * c, 8 * flat * c),
    ]


def linear_softmax_residual(head: tuple[Any, ...], known: Any, classes: slice) -> list[Bound]:
    z, size = _head(head)
    rounds = _softmax(z, (head[0].shape[1] + 3) * size)
    delta = _residual(z, head[3])[0][:, classes]
    delta = delta if head[4] is None else delta * head[4][:, None]
    return [Bound((rounds.relative + 8 * rounds.largest[:, None]) * delta, 8 * size * delta)]


def objective(
    logits: Tensor, labels: Tensor, name: str, auxiliary: Tensor | None = None
) -> list[Bound]:
    known, value = _softmax(logits), reference.objective(logits, labels, name, auxiliary)
    return [Bound(2 * known.relative[:, 0] + 8 * (known.largest + value.abs()))]


def objective_residual(
    logits: Tensor, labels: Tensor, name: str, auxiliary: Tensor | None = None
) -> list[Bound]:
    """The definition, by autograd, subtracts 1 from probabilities: an absolute error."""
    known = _softmax(logits)
    value = reference.objective_residual(logits, labels, name, auxiliary)
    rounded = (2 * known.relative + 8 * known.largest[:, None]) * value.abs()
    return [Bound(rounded, definition=2 * known.relative)]


def head_ascent_gradient(
    features: Tensor, labels: Tensor, weights: Tensor, theta: Tensor, has_bias: bool, name: str
) -> list[Bound]:
    act, share = reference.augment(features, has_bias), weights / weights.sum()
    z, size = act @ theta.T, (act.abs() @ theta.abs().T).amax(dim=1, keepdim=True)
    known = _softmax(z, (act.shape[1] + 3) * size)
    value = reference.objective(z, labels, name).abs()
    slope = reference.objective_residual(z, labels, name).abs() * share[:, None]
    relative = 2 * known.relative + 8 * known.largest[:, None] + len(act) + 8
    losses = 2 * known.relative[:, 0] + 8 * (known.largest + value) + len(act) * (1 + value)
    return [
        Bound(
            (relative * slope).T @ act.abs(),
            2 * slope.T @ act.abs(),
            ((relative * share[:, None]).T @ act.abs()).expand(len(theta), -1),
        ),
        Bound((share * losses).sum()),
    ]


def head_ascent(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor,
    has_bias: bool,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
) -> list[Bound]:
    """Of the loss, then theta and the buffer after it."""
    operands = (features, labels, weights, theta, has_bias, name)
    gradient, loss = head_ascent_gradient(*operands)
    step = reference.head_ascent_gradient(*operands)[0].abs()
    beside = momentum * buffer.abs() + alpha + weight_decay * theta.abs()
    moved = gradient.rounded + 6 * (step + beside)
    penalty = (theta.numel() + 4) * alpha * theta.abs().sum()
    velocity = step + beside
    return [
        Bound(loss.rounded + penalty),
        Bound(
            2 * theta.abs() + lr * (moved + 4 * velocity),
            lr * gradient.cut,
            lr * gradient.definition,
        ),
        Bound(moved, gradient.cut, gradient.definition),
    ]


def conjugate_gradient_iteration(state: tuple[Tensor, ...], mp: Tensor) -> list[Bound]:
    """Of the state after it, without a preconditioner; M positive definite."""
    x, r, p, rho, _, goal, _ = state
    axes, length = tuple(range(1, x.dim())), x[0].numel() + 8
    curvature = (p * mp).sum(axes, keepdim=True)
    # Signs differ within the sum, so that its error is not relative to the sum itself.
    worse = (p * mp).abs().sum(axes, keepdim=True) / curvature.abs()
    step = rho / curvature
    relative = length * worse + 4
    new_r = r - step * mp
    of_x = (relative * step * p).abs() + 2 * (x + step * p).abs() + 2 * (step * p).abs()
    of_r = (relative * step * mp).abs() + 2 * new_r.abs() + 2 * (step * mp).abs()
    new = new_r.square().sum(axes, keepdim=True)
    of_size = (2 * new_r.abs() * of_r).sum(axes, keepdim=True) + length * new
    turn = new / rho
    of_p = of_r + (of_size / rho + 4 * turn) * p.abs() + 4 * (new_r.abs() + turn * p.abs())
    return [Bound(b) for b in (of_x, of_r, of_p, of_size, of_size, goal, relative * step.abs())]


def damped_cholesky_solve(a: Tensor, b: Tensor, damping: float) -> list[Bound]:
    """``|x - x'| <= g |M^-1| |U^T| |U| |x'|``, g about ``(3 P + 1) u`` (Higham, theorem 10.4)."""
    m = a + damping * torch.eye(len(a), dtype=a.dtype)
    upper = torch.linalg.cholesky(m).T
    x = torch.cholesky_solve(b, upper, upper=True)
    size = torch.linalg.inv(m).abs() @ (upper.abs().T @ (upper.abs() @ x.abs()))
    return [Bound((3 * len(a) + 8) * size)]
