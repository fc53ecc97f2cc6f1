"""The GGN and what is made of it, as dense float64 matrices: a part of the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def augment(act: Tensor, has_bias: bool) -> Tensor:
    """``a~ = [act, 1]``: [N, d] to [N, D]."""
    return torch.cat([act, torch.ones_like(act[:, :1])], dim=1) if has_bias else act


def output_matrix(p: Tensor, form: str = "softmax") -> Tensor:
    """``B`` of one token: ``diag(p) - p p^T``, ``diag(p)`` ("diagonal") or p itself ("dense").

    Of the largest p_i entry (i, i) of the first is ``p_i sum_{j != i} p_j``, which ``p_i - p_i^2``
    would lose where p_i is nearly one.
    """
    if form != "softmax":
        return p.double() if form == "dense" else torch.diag(p.double())
    p, m = p.double(), int(p.argmax())
    out = torch.diag(p) - torch.outer(p, p)
    out[m, m] = p[m] * torch.cat([p[:m], p[m + 1 :]]).sum()
    return out


def ggn_product(
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    v: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    form: str = "softmax",
) -> Tensor:
    """``1/n sum_t c_t B_t V a~_t a~_t^T + lam V``, B as :func:`output_matrix`: v's shape, float64.

    v: [C, D], or [m, C, D] for m of them.
    """
    if v.dim() == 3:
        products = [ggn_product(p, scale, act, x, n, damping, has_bias, form) for x in v]
        return torch.stack(products)
    out = damping * v.double()
    for pt, c, a in zip(p, scale.double(), augment(act.double(), has_bias), strict=True):
        out = out + c / n * output_matrix(pt, form) @ v.double() @ torch.outer(a, a)
    return out


def ggn_matrix(
    p: Tensor,
    scale: Tensor,
    act: Tensor,
    n: int,
    damping: float,
    has_bias: bool,
    form: str = "softmax",
) -> Tensor:
    """The damped GGN as a dense matrix: [P, P], float64; P = C D."""
    columns = p.shape[1] * (act.shape[1] + has_bias)
    out = damping * torch.eye(columns, dtype=torch.float64)
    for pt, c, a in zip(p, scale.double(), augment(act.double(), has_bias), strict=True):
        out += c / n * torch.kron(output_matrix(pt, form), torch.outer(a, a))
    return out


def ggn_block_matrix(
    p: Tensor, scale: Tensor, act: Tensor, n: int, damping: float, has_bias: bool
) -> Tensor:
    """``ggn``'s diagonal class blocks, the rest zero: [P, P], float64."""
    full = ggn_matrix(p, scale, act, n, damping, has_bias)
    width = act.shape[1] + has_bias
    mask = torch.block_diag(*[torch.ones(width, width, dtype=torch.float64)] * p.shape[1])
    return full * mask


def kronecker_factors(
    p: Tensor, scale: Tensor, act: Tensor, n: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """``mean(diag(p) - p p^T)`` and ``mean(a~ a~^T)``, tokens weighted by ``c_t/n``; float64.

    The first carries the weights' sum (less than one if a sample has no token).
    """
    b = torch.zeros(p.shape[1], p.shape[1], dtype=torch.float64)
    a = torch.zeros(act.shape[1] + has_bias, act.shape[1] + has_bias, dtype=torch.float64)
    for pt, c, at in zip(p.double(), scale.double(), augment(act.double(), has_bias), strict=True):
        b += c / n * output_matrix(pt)
        a += c * torch.outer(at, at)
    return b, a / scale.double().sum()


def kfac_matrix(
    p: Tensor, scale: Tensor, act: Tensor, n: int, damping: float, has_bias: bool
) -> Tensor:
    """``mean(diag(p)-pp^T) (x) mean(a~ a~^T) + lam I``: [P, P], float64."""
    b, a = kronecker_factors(p, scale, act, n, has_bias)
    return torch.kron(b, a) + damping * torch.eye(len(b) * len(a), dtype=torch.float64)


def ekfac_matrix(
    p: Tensor, scale: Tensor, act: Tensor, n: int, damping: float, has_bias: bool, q: Tensor
) -> Tensor:
    """The diagonal of ``Q^T ggn Q``, in the basis Q [P, P]: [P, P], float64.

    Q is ``Q_B (x) Q_A`` of K-FAC's factors; given, because it is not unique where eigenvalues meet.
    """
    full = ggn_matrix(p, scale, act, n, damping, has_bias)
    return q @ torch.diag((q.T @ full @ q).diagonal()) @ q.T
