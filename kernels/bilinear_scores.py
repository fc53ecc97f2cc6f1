"""Row-wise bilinear forms ``<g_i, X_j>``: the product ``delta @ X_j`` is never stored.

FLOPs: 2 N C D per X. Bytes: delta, X and act once (their tiles are shared through L2), and one
partial score per token and tile of columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from imu_fast.kernels.specialisation import (
    Specialisation,
    aligned,
    dots,
    eights,
    forms,
    specialise,
)

# "ieee" multiplies on the ordinary units, where a thread holds its outputs: smaller tiles.
CONFIGS = {
    "ieee": {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_C": 16, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3},
    "half": {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3},
}
# Tokens of one sample that are added at once.
BLOCK_T = 128


@triton.jit
def bilinear_scores_kernel(
    delta_ptr,
    act_ptr,
    x_ptr,
    out_ptr,
    N,
    C,
    d,
    D,
    bias_column,
    stride_dn,
    stride_dc,
    stride_an,
    stride_ak,
    stride_xj,
    stride_xc,
    stride_xk,
    stride_oj,
    stride_os,
    SQUARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: BLOCK_N tokens, BLOCK_K columns and one X of ``sum_k (delta @ X)[n,k] a~[n,k]``.

    Programs that share tokens run side by side, so delta comes from memory once. a~ is act with a 1
    in bias_column (-1: none); C, d, D and the rows are padded with zeros to multiples of 8. With
    SQUARE the factors are delta*delta and a~*a~: a quadratic form in g.

    delta_ptr [N, C]; act_ptr [N, d]; x_ptr [m, C, D]; out_ptr [m, tiles of columns, N] float32.
    """
    C, d, D = eights(C), eights(d), eights(D)
    stride_dn, stride_an = eights(stride_dn), eights(stride_an)
    stride_xj, stride_xc = eights(stride_xj), eights(stride_xc)
    tiles_k = tl.cdiv(D, BLOCK_K)
    tile_k = tl.program_id(0) % tiles_k
    j = tl.program_id(1)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = n < N, k < D
    n, k, j = n.to(tl.int64), k.to(tl.int64), j.to(tl.int64)
    x_ptr += j * stride_xj

    product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_c = c < C
        c = c.to(tl.int64)
        delta = tl.load(
            delta_ptr + n[:, None] * stride_dn + c[None, :] * stride_dc,
            mask=mask_n[:, None] & mask_c[None, :],
            other=0.0,
        )
        if SQUARE:
            delta = delta.to(tl.float32) * delta.to(tl.float32)
        x = tl.load(
            x_ptr + c[:, None] * stride_xc + k[None, :] * stride_xk,
            mask=mask_c[:, None] & mask_k[None, :],
            other=0.0,
        )
        product = tl.dot(delta.to(DOT), x.to(DOT), product, input_precision=INPUT_PRECISION)

    a = tl.load(
        act_ptr + n[:, None] * stride_an + k[None, :] * stride_ak,
        mask=mask_n[:, None] & (k < d)[None, :],
        other=0.0,
    ).to(tl.float32)
    a = tl.where(k[None, :] == bias_column, 1.0, a)
    if SQUARE:
        a = a * a
    partial = tl.sum(product * a, axis=1)
    tl.store(out_ptr + j * stride_oj + tile_k.to(tl.int64) * stride_os + n, partial, mask=mask_n)


@triton.jit
def token_sums_kernel(
    partial_ptr,
    offsets_ptr,
    out_ptr,
    S,
    stride_pj,
    stride_ps,
    stride_oi,
    BLOCK_T: tl.constexpr,
):
    """One program: ``out[i, j] = sum_{t of i} sum_s partial[j, s, t]``, always in this order.

    partial_ptr [m, S, N] float32; offsets_ptr [n+1] int64; out_ptr [n, m] float32.
    """
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_T], tl.float32)
    stop = tl.load(offsets_ptr + i + 1)
    for start in range(tl.load(offsets_ptr + i), stop, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask_t = t < stop
        for s in range(0, S):
            row_ptr = partial_ptr + j * stride_pj + s * stride_ps
            total += tl.load(row_ptr + t, mask=mask_t, other=0.0)
    tl.store(out_ptr + i * stride_oi + j, tl.sum(total, axis=0))


def bilinear_scores(
    delta: torch.Tensor,
    act: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    has_bias: bool,
    precision: str = "ieee",
    square: bool = False,
) -> torch.Tensor:
    """Scores [n, m] float32; delta [N, C], act [N, d], x [m, C, D]; offsets None: N = n."""
    bias = act.shape[1] if has_bias else -1
    made = dots(precision, delta.dtype, x.dtype, squared=square)
    delta, act = aligned(delta), aligned(act)
    x = aligned(x, rows=delta.shape[1])
    (N, C), d, (m, _, D) = delta.shape, act.shape[1], x.shape
    config = CONFIGS[made.kind]
    tiles = triton.cdiv(D, config["BLOCK_K"])
    partial = torch.empty(m, tiles, N, dtype=torch.float32, device=delta.device)
    strides = (*delta.stride(), *act.stride(), *x.stride(), *partial.stride()[:2])
    constants = {"SQUARE": square, **made.constants}
    if N:
        bilinear_scores_kernel[(triton.cdiv(N, config["BLOCK_N"]) * tiles, m)](
            delta, act, x, partial, N, C, d, D, bias, *strides, **constants, **config
        )
    if offsets is None:
        return partial.sum(dim=1).t()
    n = len(offsets) - 1
    out = torch.empty(n, m, dtype=torch.float32, device=delta.device)
    token_sums_kernel[(n, m)](
        partial, offsets.to(delta.device), out, tiles, *partial.stride()[:2], m, BLOCK_T=BLOCK_T
    )
    return out


def specialisations() -> Iterator[Specialisation]:
    """Every configuration; squares in the two that the operation uses them in."""
    for name, signal, inputs, constants, options in forms(CONFIGS):
        for square in (False, True):
            yield specialise(
                f"bilinear_scores {name}{' squared' if square else ''}",
                bilinear_scores_kernel,
                {
                    "delta_ptr": f"*{signal}",
                    "act_ptr": f"*{inputs}",
                    "x_ptr": f"*{signal}",
                    "out_ptr": "*fp32",
                },
                {"stride_dc": 1, "stride_ak": 1, "stride_xk": 1, "SQUARE": square, **constants},
                options,
                matrix_units=name != "ieee",
            )
    yield specialise(
        "token_sums",
        token_sums_kernel,
        {"partial_ptr": "*fp32", "offsets_ptr": "*i64", "out_ptr": "*fp32"},
        {"BLOCK_T": BLOCK_T},
        {"num_warps": 4},
    )
