"""The GGN of a softmax head as a dense matrix: between contrasts of the classes, or its dual.

``diag(p) - p p^T`` maps a constant over the classes to zero, so in an orthonormal basis of the
contrasts (vectors that sum to zero) the GGN has order ``(C - 1) D``, and is lam on what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

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

    A later contrast is constant where contrast c is not zero, so the covariance of two is
    ``q_c (s_e - q_e)``, with their means ``q = B^T p`` and e's first entry ``s_e``.
    """
    means = (p @ basis).t().contiguous()
    squares = (p @ basis.square()).t()
    for c, (mean, square) in enumerate(zip(means, squares, strict=True)):
        rows = (basis[0, c:, None] - means[c:]).mul_(weight * mean)
        rows[0] = weight * (square - mean.square())
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
    """What is linear in p by one product for all classes, and one Gram matrix of ``B^T p (x) a~``.

    ``B^T diag(p) B`` of contrasts c < e is ``s_e (B^T p)_c``, see :func:`_covariances`.
    """
    classes, width = p.shape[1], a.shape[1]
    count, order = classes - 1, (classes - 1) * width
    moments = a.new_zeros(classes * width, width)
    gram = a.new_zeros(order, order)
    step = max(1, _WHOLE_ELEMENTS // (classes * width))
    for start in range(0, len(a), step):
        q, w, b = p[start : start + step], weight[start : start + step, None], a[start:][:step]
        moments.addmm_(((q * w)[:, :, None] * b[:, None]).flatten(1).t(), b)
        y = (((q @ basis) * w.sqrt())[:, :, None] * b[:, None]).flatten(1)
        for first in range(0, order, _WHOLE_STRIP):
            strip = slice(first, first + _WHOLE_STRIP)
            gram[strip, first:].addmm_(y[:, strip].t(), y[:, first:])
    flat, own = moments.view(classes, -1), torch.arange(count, device=a.device)
    linear = (basis.t() @ flat).view(count, width, 1, width) * basis[0][:, None]
    linear[own, :, own] = (basis.square().t() @ flat).view(count, width, width)
    return linear.view(order, order).sub_(gram)


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


def dual_matrix(p: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """``J J^T`` [N C, N C], where ``GGN = J^T J`` and token t's rows of J are ``S_t^T (x) a~_t``.

    ``S_t = sqrt(c_t/n) (diag(sqrt p) - p sqrt(p)^T)``, so the dual is the elementwise product of
    the Gram matrix of the S_t and that of the a~_t. Arguments as :func:`primal_matrix`.
    """
    tokens, classes = p.shape
    root = p.sqrt()
    s = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
    columns = (s * weight.sqrt()[:, None, None]).transpose(0, 1).reshape(classes, -1)
    dual = (columns.t() @ columns).view(tokens, classes, tokens, classes)
    return dual.mul_((a @ a.t())[:, None, :, None]).view(tokens * classes, tokens * classes)
