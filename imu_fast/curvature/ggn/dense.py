"""The GGN of a head as a dense matrix, or its dual; of a softmax between contrasts of the classes.

``diag(p) - p p^T`` maps a constant over the classes to zero, so in an orthonormal basis of the
contrasts (vectors that sum to zero) the GGN has order ``(C - 1) D``, and is lam on what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from imu_fast.losses.output_curvature import Diagonal, OutputCurvature, Softmax

# Elements of a strip's rows, or of all products of two features, at once: they stay in cache.
_STRIP_ELEMENTS = 1 << 19
# Features at once: half of each block, which is symmetric, need not be summed at all.
_STRIP = 16
# Elements of the [tokens, C D] rows that exist at once, and rows of the result at once.
_WHOLE_ELEMENTS = 1 << 22
_WHOLE_STRIP = 512

Route = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=4)
def contrasts(classes: int) -> Tensor:
    """Helmert's orthonormal basis of the vectors that sum to zero: [C, C-1], float64.

    Column c is 1 in rows 0 to c and ``-(c + 1)`` in row c + 1, divided by its norm.
    """
    count = torch.arange(1, classes, dtype=torch.float64)
    basis = torch.ones(classes, classes - 1, dtype=torch.float64).triu_()
    basis[1:].diagonal().copy_(-count)
    return basis * (count * (count + 1)).rsqrt()


def _covariances(p: Tensor, weight: Tensor, basis: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``c`` and ``w (B^T (diag(p) - p p^T) B)[c, c:]`` of every token: [C-1-c, N], for every c.

    With s the first entry of contrast c, and P, Q, R the probabilities of the classes up to c, of
    c + 1 and of those beyond, its mean is ``q_c = s (P - (c+1) Q)``. A later contrast e is constant
    where c is not zero, so their covariance is ``q_c (s_e - q_e) = q_c s_e ((e+2) Q_e + R_e)``; the
    variance is ``s^2 ((c+2)^2 P Q + P R + (c+1)^2 Q R)``. None is a difference that cancels where
    one p is nearly one.
    """
    q = p.t().contiguous()
    up_to = q.cumsum(dim=0)[:-1]
    beyond = q.flip(0).cumsum(dim=0).flip(0)
    beyond = torch.cat([beyond[2:], torch.zeros_like(q[:1])])
    first = basis[0, :, None]
    count = torch.arange(1, len(q), dtype=q.dtype, device=q.device)[:, None]
    means = first * (up_to - count * q[1:])
    ahead = first * ((count + 1) * q[1:] + beyond)
    for c in range(len(means)):
        rows = ahead[c:] * (weight * means[c])
        k = c + 1
        pairs = up_to[c] * ((k + 1) ** 2 * q[k] + beyond[c]) + k**2 * q[k] * beyond[c]
        rows[0] = weight * first[c] ** 2 * pairs
        yield c, rows


def _add_strips(blocks: Tensor, p: Tensor, weight: Tensor, a: Tensor, basis: Tensor) -> None:
    """Class pairs times a strip of features, by the features from there on: few long rows."""
    width, b = a.shape[1], a.t().contiguous()
    for c, rows in _covariances(p, weight, basis):
        for first in range(0, width, _STRIP):
            strip = slice(first, min(first + _STRIP, width))
            left = (rows[:, None] * b[strip]).flatten(0, 1)
            sums = (left @ b[first:].t()).view(len(rows), -1, width - first)
            blocks[c, strip, c:, first:] += sums.transpose(0, 1)


def _mirror(blocks: Tensor) -> None:
    """Fill the half of each block that :func:`_add_strips` leaves out."""
    classes, width = blocks.shape[:2]
    for c in range(classes):
        row = blocks[c, :, c:]
        for first in range(_STRIP, width, _STRIP):
            strip = slice(first, first + _STRIP)
            row[strip, :, :first] = row[:first, :, strip].permute(2, 1, 0)


def _add_pairs(packed: list[Tensor], p: Tensor, weight: Tensor, a: Tensor, basis: Tensor) -> None:
    """Class pairs by the products of feature pairs [D (D+1) / 2, N], formed once: few features."""
    b = a.t().contiguous()
    products = torch.cat([b[i] * b[i:] for i in range(len(b))])
    for c, rows in _covariances(p, weight, basis):
        packed[c].addmm_(rows, products.t())


def _unpack(blocks: Tensor, packed: list[Tensor]) -> None:
    width = blocks.shape[1]
    first, second = torch.triu_indices(width, width, device=blocks.device)
    where = torch.empty(width, width, dtype=torch.int64, device=blocks.device)
    where[first, second] = where[second, first] = torch.arange(len(first), device=blocks.device)
    for c, row in enumerate(packed):
        blocks[c, :, c:] = row[:, where].transpose(0, 1)


def _by_strips(p: Tensor, weight: Tensor, a: Tensor, basis: Tensor) -> Tensor:
    classes, width = basis.shape[1], a.shape[1]
    out = a.new_zeros(classes * width, classes * width)
    blocks = out.view(classes, width, classes, width)
    step = max(64, _STRIP_ELEMENTS // max(1, classes * _STRIP))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        _add_strips(blocks, p[rows], weight[rows], a[rows], basis)
    _mirror(blocks)
    return out


def _by_pairs(p: Tensor, weight: Tensor, a: Tensor, basis: Tensor) -> Tensor:
    classes, width = basis.shape[1], a.shape[1]
    out = a.new_empty(classes * width, classes * width)
    pairs = width * (width + 1) // 2
    packed = [a.new_zeros(classes - c, pairs) for c in range(classes)]
    step = max(64, _STRIP_ELEMENTS // max(pairs, classes))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        _add_pairs(packed, p[rows], weight[rows], a[rows], basis)
    _unpack(out.view(classes, width, classes, width), packed)
    return out


def _whole(p: Tensor, weight: Tensor, a: Tensor, basis: Tensor) -> Tensor:
    """What is linear in p by one product for all classes, and one Gram matrix for the rest.

    Of each token the likeliest class m stands apart, e being what the others have and u the sum of
    their ``p_j b_j`` (b_j the rows of B): the covariance is ``sum_{j != m} p_j b_j b_j^T`` less
    ``u u^T / e`` plus ``p_m/e (e b_m - u)(e b_m - u)^T``, all of the size of e, however small. The
    first term of contrasts c < e is ``s_e`` times contrast c's mean, see :func:`_covariances`.
    """
    classes, width = p.shape[1], a.shape[1]
    count, order = classes - 1, (classes - 1) * width
    moments = a.new_zeros(classes * width, width)
    gram = a.new_zeros(order, order)
    step = max(1, _WHOLE_ELEMENTS // (classes * width))
    for start in range(0, len(a), step):
        q, w, b = p[start : start + step], weight[start : start + step, None], a[start:][:step]
        most, top = q.max(dim=1, keepdim=True)
        rest = q.scatter(1, top, 0.0)
        moments.addmm_(((rest * w)[:, :, None] * b[:, None]).flatten(1).t(), b)
        others = rest.sum(dim=1, keepdim=True)
        share = (w / others.where(others > 0, torch.inf)).sqrt()
        u = rest @ basis
        apart = (others * basis[top[:, 0]] - u) * (share * most.sqrt())
        y = torch.cat([u * share, apart])[:, :, None] * torch.cat([b, b])[:, None]
        y = y.flatten(1)
        signed = torch.cat([-y[: len(b)], y[len(b) :]])
        for first in range(0, order, _WHOLE_STRIP):
            strip = slice(first, first + _WHOLE_STRIP)
            gram[strip, first:].addmm_(signed[:, strip].t(), y[:, first:])
    flat, own = moments.view(classes, -1), torch.arange(count, device=a.device)
    linear = (basis.t() @ flat).view(count, width, 1, width) * basis[0][:, None]
    linear[own, :, own] = (basis.square().t() @ flat).view(count, width, width)
    return linear.view(order, order).add_(gram)


def _route(tokens: int, count: int, width: int) -> Route:
    """The fastest as measured; where tokens or features are few, small products cost more."""
    if width > 2 * count:
        return _by_strips if tokens * width >= 10_000 else _whole
    return _by_pairs if tokens >= 200 and width >= 5 else _whole


def primal_matrix(p: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """``sum_t w_t B^T (diag(p) - p p^T) B (x) a~ a~^T``, B the contrasts: ``(C-1) D`` squared.

    Only its upper triangle is complete, which is what a factorisation reads. About ``N P^2``
    FLOPs, P the order, where tokens are many (blocks are symmetric themselves), else twice that.

    Args:
        p: [N, C], summing to one. weight: [N], ``c_t / n``. a: [N, D], augmented.
    """
    basis = contrasts(p.shape[1]).to(a)
    return _route(len(a), basis.shape[1], a.shape[1])(p, weight, a, basis)


def class_blocks(h: Tensor, a: Tensor) -> Tensor:
    """``sum_t h_tc a~ a~^T`` for every class c: [C, D, D]; h: [N, C], a: [N, D]."""
    out = a.new_empty(h.shape[1], a.shape[1], a.shape[1])
    for block, weight in zip(out, h.T, strict=True):
        torch.matmul((a * weight[:, None]).T, a, out=block)
    return out


def coupled_matrix(b: Tensor, a: Tensor) -> Tensor:
    """``sum_t B_t (x) a~ a~^T``, its upper triangle: [C D, C D]; b: [N, C, C], a: [N, D]."""
    classes, width = b.shape[1], a.shape[1]
    out = a.new_zeros(classes * width, classes * width)
    step = max(1, _WHOLE_ELEMENTS // (classes * width))
    for start in range(0, len(a), step):
        wide = a[start : start + step]
        for c in range(classes):
            rows = b[start : start + step, c, c:, None] * wide[:, None]
            out[c * width : (c + 1) * width, c * width :].addmm_(wide.t(), rows.flatten(1))
    return out


def primal_blocks(outputs: OutputCurvature, n: int, a: Tensor) -> Tensor:
    """``1/n sum_t B_t (x) a~ a~^T`` as in :func:`dense_orders`: a matrix, or [C, D, D] blocks.

    Of a softmax between the contrasts. a: [N, D], in the dtype of the result.
    """
    found = outputs.map(lambda x: x.to(a))
    if isinstance(found, Softmax):
        return primal_matrix(found.p, found.weight / n, a)
    build = class_blocks if isinstance(found, Diagonal) else coupled_matrix
    return build(found.operand / n, a)


def dual_blocks(root: Tensor, a: Tensor) -> Tensor:
    """``J J^T``, where ``GGN = J^T J`` and token t's rows of J are ``S_t^T (x) a~_t``.

    The elementwise product of the Gram matrix of the S_t and that of the a~_t.

    Args:
        root: the ``S_t / sqrt(n)`` [N, C, C], for a result [N C, N C]; or of diagonal ones [N, C],
            for blocks [C, N, N]. a: [N, D].
    """
    products = a @ a.t()
    if root.dim() == 2:
        columns = root.t()
        return (columns[:, :, None] * columns[:, None]).mul_(products)
    tokens, classes = root.shape[:2]
    columns = root.transpose(0, 1).reshape(classes, -1)
    dual = (columns.t() @ columns).view(tokens, classes, tokens, classes)
    return dual.mul_(products[:, None, :, None]).view(tokens * classes, tokens * classes)
