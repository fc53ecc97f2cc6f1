"""Row-wise bilinear forms ``<g_i, X>`` from gradient factors."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.ops.fisher_diagonal import CHUNK_TOKENS, TILE_ELEMENTS, gradient_tiles
from imu_fast.ops.operation import PRODUCTS, kernel_dtypes, operation
from imu_fast.ops.routes import forms_for_norms
from imu_fast.ops.tokens import groups_of_equal_length, is_flat, sum_over_tokens, widened

# Elements of the per-token gradients that exist at once where they are formed: 1 MB in float32.
_GRADIENT_ELEMENTS = 1 << 18
_FEWEST_TOKENS = 64
# Numbers of products that a cache holds; of one product as many columns as are at full speed, and
# beyond the fewest no more than the right side is a copy of so many elements.
_CACHED_ELEMENTS = 1 << 19
_FEWEST_COLUMNS, _MOST_COLUMNS, _COPIED_ELEMENTS = 256, 4096, 1 << 21
# Of fewer X sums over classes are long for their number.
_FEW = 8
# Pairs of one sample's tokens that exist at once.
_PAIRS = 1 << 18


def _token_scores(delta: Tensor, act: Tensor, x: Tensor, has_bias: bool) -> Tensor:
    """``delta_t^T X a~_t`` per token: [N], by chunks of rows; x [C, D].

    Of the products ``X a~_t`` [C] and ``delta_t^T X`` [D] the shorter one is made.
    """
    classes, d = delta.shape[1], act.shape[1]
    out = delta.new_empty(delta.shape[0])
    for start in range(0, delta.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        if classes <= d:
            # Class by class in memory, which is faster of a few and no slower of many.
            left, right = x[:, :d], act[rows].to(delta.dtype).t()
            product = torch.addmm(x[:, d:], left, right) if has_bias else left @ right
            out[rows] = product.mul_(delta[rows].t()).sum(dim=0)
            continue
        product = delta[rows] @ x
        if has_bias:
            # A narrower act is converted entry by entry, as it is multiplied.
            out[rows] = (product[:, :d].mul_(act[rows])).sum(dim=1).add_(product[:, d])
        else:
            out[rows] = product.mul_(act[rows]).sum(dim=1)
    return out


def _many_scores(delta: Tensor, act: Tensor, x: Tensor, has_bias: bool) -> Tensor:
    """``delta_t^T X_j a~_t`` for every j: [N, m], in either order, whichever stores less.

    ``(a~_t X_j^T) . delta_t`` makes C m numbers of a token, ``(delta_t (x) a~_t) . X_j`` C D.
    """
    d, (many, classes, width) = act.shape[1], x.shape
    if many >= width:
        out = delta.new_empty(delta.shape[0], many)
        step = max(_FEWEST_TOKENS, _GRADIENT_ELEMENTS // (classes * width))
        flat = x.flatten(1).t()
        gradient = delta.new_empty(min(step, len(delta)), classes, width)
        for start in range(0, delta.shape[0], step):
            signal = delta[start : start + step, :, None]
            g = gradient[: len(signal)]
            torch.mul(signal, act[start : start + step, None, :], out=g[..., :d])
            if has_bias:
                g[..., d:] = signal
            torch.mm(g.flatten(1), flat, out=out[start : start + step])
        return out
    out = delta @ x[:, :, d].t() if has_bias else delta.new_zeros(len(delta), many)
    columns = max(_FEWEST_COLUMNS, min(_MOST_COLUMNS, _COPIED_ELEMENTS // width))
    step = max(1, columns // many)
    for start in range(0, classes, step):
        _add_products(out, delta[:, start : start + step], act, x[:, start : start + step, :d])
    return out


def _add_products(out: Tensor, delta: Tensor, act: Tensor, x: Tensor) -> None:
    """``out += (act_t X_j^T) . delta_t``, some rows at a time, of which products stay in a cache.

    Of a row its products are [C, m], which a sum over the classes reads in the order that they
    lie: of [m, C] with few classes it takes as long as the product. That is left to few X.
    """
    many, classes, d = x.shape
    few = many < _FEW
    right = (x if few else x.transpose(0, 1)).reshape(-1, d).t()
    elements = _CACHED_ELEMENTS if out.device.type == "cpu" else TILE_ELEMENTS
    step = max(1, elements // (classes * many))
    held = out.new_empty(min(step, len(out)), classes * many)
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        inputs = act[rows].to(out.dtype)
        u = torch.mm(inputs, right, out=held[: len(inputs)])
        if few:
            out[rows, :, None].baddbmm_(u.view(-1, many, classes), delta[rows, :, None])
        else:
            out[rows, None].baddbmm_(delta[rows, None], u.view(-1, classes, many))


def _kernel_limits(delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool) -> str:
    return kernel_dtypes(delta, act, x)


def _launch(
    delta: Tensor,
    act: Tensor,
    x: Tensor,
    offsets: Tensor,
    has_bias: bool,
    precision: str,
    square: bool = False,
) -> Tensor:
    from imu_fast.kernels import bilinear_scores as kernel

    many = x if x.dim() == 3 else x[None]
    ragged = None if is_flat(offsets) else offsets
    out = kernel.bilinear_scores(delta, act, many, ragged, has_bias, precision, square)
    return (out if x.dim() == 3 else out[:, 0]).to(delta.dtype)


@operation(kernel=_launch, limits=_kernel_limits, products=PRODUCTS)
def bilinear_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> Tensor:
    """``<g_i, X>`` for every sample, and for several X at once.

    Args:
        delta: [N, C]. act: [N, d], delta's dtype or a narrower one. offsets: [n+1].
        has_bias: whether a~ has a trailing 1.
        x: [C, D], or [m, C, D] for m of them.

    Returns:
        [n], or [n, m], in delta's dtype.
    """
    per_token = (_token_scores if x.dim() == 2 else _many_scores)(delta, act, x, has_bias)
    return per_token if is_flat(offsets) else sum_over_tokens(per_token, offsets)


def _square_limits(delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool) -> str:
    ragged = "" if is_flat(offsets) else "the square of a sum over tokens has no kernel yet"
    return kernel_dtypes(delta, act, x) or ragged


def _launch_squares(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool, precision: str
) -> Tensor:
    return _launch(delta, act, x, offsets, has_bias, precision, square=True)


@operation(kernel=_launch_squares, limits=_square_limits, products=PRODUCTS)
def quadratic_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> Tensor:
    """``sum_ck X[c,k] g_i[c,k]^2``: self-influence under a diagonal curvature.

    Args:
        delta: [N, C]. act: [N, d], delta's dtype or a narrower one. offsets: [n+1].
        has_bias: whether a~ has a trailing 1.
        x: [C, D].

    Returns:
        [n] in delta's dtype.
    """
    n = len(offsets) - 1
    out = delta.new_zeros(n)
    if is_flat(offsets):
        for start in range(0, n, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            squares = delta[rows].square(), act[rows].to(delta.dtype).square()
            out[rows] = _token_scores(*squares, x, has_bias)
        return out
    for samples, slab, g in gradient_tiles(delta, act, offsets, has_bias):
        out[samples] += (g.square_() * x[slab]).sum(dim=(1, 2))
    return out


def _row_norms(x: Tensor) -> Tensor:
    """``||x_t||``: [N]; anew in float64 of rows so small that their squares underflow."""
    norms = torch.linalg.vector_norm(x, dim=1)
    known = torch.finfo(x.dtype)
    lost = torch.nonzero(norms * norms < known.tiny / known.eps)[:, 0]
    if len(lost):
        norms[lost] = torch.linalg.vector_norm(x[lost].double(), dim=1).to(x.dtype)
    return norms


@operation(products=PRODUCTS)
def gradient_norms(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``||g_i||^2``; of a single token ``||delta||^2 ||a~||^2`` (Goodfellow 2015).

    Args:
        delta: [N, C]. act: [N, d], delta's dtype or a narrower one. offsets: [n+1].
        has_bias: whether a~ has a trailing 1.

    Returns:
        [n] in delta's dtype.
    """
    if is_flat(offsets):
        parts = [_row_norms(inputs) for _, inputs, _ in widened(delta, act, offsets)]
        signal, features = _row_norms(delta), parts[0] if len(parts) == 1 else torch.cat(parts)
        if has_bias:
            features = torch.hypot(features, features.new_ones(()))
        return signal.mul_(features).square_()  # the square of either may underflow
    longest = int(offsets.diff().max())
    if forms_for_norms(longest, delta.shape[1], act.shape[1] + has_bias):
        ones = delta.new_ones(1, 1).expand(delta.shape[1], act.shape[1] + has_bias)
        return quadratic_scores(delta, act, ones, offsets, has_bias)
    out = delta.new_zeros(len(offsets) - 1)
    for samples, tokens in groups_of_equal_length(offsets, delta.device):
        step = max(1, _PAIRS // tokens.shape[1] ** 2)
        for chunk, rows in zip(samples.split(step), tokens.split(step), strict=True):
            signal, inputs = delta[rows], act[rows].to(delta.dtype)
            pairs = torch.bmm(signal, signal.transpose(1, 2))
            features = torch.bmm(inputs, inputs.transpose(1, 2))
            if has_bias:
                features.add_(1)
            out[chunk] = pairs.mul_(features).sum(dim=(1, 2))
    return out.clamp_min_(0)  # which rounding may undo where tokens cancel
