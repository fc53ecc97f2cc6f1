"""The diagonal of the empirical Fisher, ``F = 1/n sum_i g_i * g_i``, without a gradient stored.

FLOPs: 2 N C D for images; for packed tokens 2 N C D and 2 n C D for the squares. Bytes: delta and
act once per tile of the other, mostly from L2, and F once.
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
    splits,
)

# Per kind of dot, measured by the compiler (no spills). "ieee" multiplies on the ordinary units,
# where a thread holds its outputs: smaller tiles. "half" squares bfloat16 into bfloat16 (same
# exponents), "bf16" what is float32 too; squares of float16 would underflow in float16.
CONFIGS = {
    "ieee": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BLOCK_C": 64, "BLOCK_K": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_C": 64, "BLOCK_K": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_C": 64, "BLOCK_K": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "half": {"BLOCK_C": 128, "BLOCK_K": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
}

# Two accumulators: half the tile of CONFIGS. BLOCK_N is short because samples are.
TOKEN_CONFIGS = {
    "ieee": {"BLOCK_C": 32, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2},
    "tf32x3": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3},
    "tf32": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3},
    "bf16": {"BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3},
    "half": {"BLOCK_C": 64, "BLOCK_K": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def fisher_diagonal_kernel(
    delta_ptr,
    act_ptr,
    out_ptr,
    N,
    C,
    d,
    D,
    bias_column,
    tokens_per_split,
    alpha,
    stride_dn,
    stride_dc,
    stride_an,
    stride_ak,
    stride_os,
    stride_oc,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile (c, k) of ``alpha sum_n delta[n,c]^2 a~[n,k]^2`` over one split of n.

    Squares exist in registers only. a~ is act with a 1 in bias_column (-1: none); C and d, and the
    rows of delta and act, are padded with zeros to multiples of 8.

    delta_ptr [N, C]; act_ptr [N, d]; out_ptr [splits, C, D] float32.
    """
    C, d = eights(C), eights(d)
    stride_dn, stride_an = eights(stride_dn), eights(stride_an)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    mask_c, mask_k = c < C, k < d
    c, k = c.to(tl.int64), k.to(tl.int64)

    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    stop = tl.minimum(N, (split + 1) * tokens_per_split)
    for start in range(split * tokens_per_split, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask_n = n < stop
        n = n.to(tl.int64)
        delta = tl.load(
            delta_ptr + n[None, :] * stride_dn + c[:, None] * stride_dc,
            mask=mask_n[None, :] & mask_c[:, None],
            other=0.0,
        ).to(tl.float32)
        a = tl.load(
            act_ptr + n[:, None] * stride_an + k[None, :] * stride_ak,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        ).to(tl.float32)
        a = tl.where(k[None, :] == bias_column, 1.0, a)
        total = tl.dot(
            (delta * delta).to(DOT), (a * a).to(DOT), total, input_precision=INPUT_PRECISION
        )

    out = out_ptr + split.to(tl.int64) * stride_os + c[:, None] * stride_oc + k[None, :]
    tl.store(out, alpha * total, mask=mask_c[:, None] & (k[None, :] < D))


@triton.jit
def token_fisher_diagonal_kernel(
    delta_ptr,
    act_ptr,
    offsets_ptr,
    out_ptr,
    n_samples,
    C,
    d,
    D,
    bias_column,
    samples_per_split,
    alpha,
    stride_dn,
    stride_dc,
    stride_an,
    stride_ak,
    stride_os,
    stride_oc,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile (c, k) of ``alpha sum_i (sum_t delta[t,c] a~[t,k])^2``, one split of i.

    The square is of the sum over a sample's tokens t = offsets[i] .. offsets[i+1]-1. a~ is act with
    a 1 in bias_column (-1: none); C and d, and rows, are padded with zeros to multiples of 8.

    delta_ptr [N, C]; act_ptr [N, d]; offsets_ptr [n_samples+1] int64;
    out_ptr [splits, C, D] float32.
    """
    C, d = eights(C), eights(d)
    stride_dn, stride_an = eights(stride_dn), eights(stride_an)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    mask_c, mask_k = c < C, k < d
    c, k = c.to(tl.int64), k.to(tl.int64)

    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    last = tl.minimum(n_samples, (split + 1) * samples_per_split)
    for i in range(split * samples_per_split, last):
        g = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        stop = tl.load(offsets_ptr + i + 1)
        for start in range(tl.load(offsets_ptr + i), stop, BLOCK_N):
            t = start + tl.arange(0, BLOCK_N)
            mask_t = t < stop
            delta = tl.load(
                delta_ptr + t[None, :] * stride_dn + c[:, None] * stride_dc,
                mask=mask_t[None, :] & mask_c[:, None],
                other=0.0,
            ).to(DOT)
            a = tl.load(
                act_ptr + t[:, None] * stride_an + k[None, :] * stride_ak,
                mask=mask_t[:, None] & mask_k[None, :],
                other=0.0,
            ).to(DOT)
            a = tl.where(k[None, :] == bias_column, 1.0, a)
            g = tl.dot(delta, a.to(DOT), g, input_precision=INPUT_PRECISION)
        total += g * g

    out = out_ptr + split.to(tl.int64) * stride_os + c[:, None] * stride_oc + k[None, :]
    tl.store(out, alpha * total, mask=mask_c[:, None] & (k[None, :] < D))


def fisher_diagonal(
    delta: torch.Tensor,
    act: torch.Tensor,
    offsets: torch.Tensor | None,
    has_bias: bool,
    precision: str = "ieee",
) -> torch.Tensor:
    """F [C, D], float32; delta [N, C], act [N, d]; offsets [n+1], or None: a token per sample."""
    classes, D, bias = delta.shape[1], act.shape[1] + has_bias, act.shape[1] if has_bias else -1
    made = dots(precision, delta.dtype, act.dtype, squared=offsets is None)
    delta, act = aligned(delta), aligned(act)
    (N, C), d = delta.shape, act.shape[1]
    n = N if offsets is None else len(offsets) - 1
    config = (CONFIGS if offsets is None else TOKEN_CONFIGS)[made.kind]
    tiles = triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(D, config["BLOCK_K"])
    cuts = splits(tiles[0] * tiles[1], n, config["BLOCK_N"] if offsets is None else 1)
    per_split = triton.cdiv(n, cuts)
    out = torch.empty(cuts, C, D, dtype=torch.float32, device=delta.device)
    strides = (*delta.stride(), *act.stride(), *out.stride()[:2])
    constants = {**made.constants, **config}
    if offsets is None:
        fisher_diagonal_kernel[(*tiles, cuts)](
            delta, act, out, N, C, d, D, bias, per_split, 1 / n, *strides, **constants
        )
    else:
        offsets = offsets.to(delta.device)
        token_fisher_diagonal_kernel[(*tiles, cuts)](
            delta, act, offsets, out, n, C, d, D, bias, per_split, 1 / n, *strides, **constants
        )
    return (out[0] if cuts == 1 else out.sum(dim=0))[:classes]


def specialisations() -> Iterator[Specialisation]:
    """Every configuration of both kernels."""
    for kernel, configs in (
        (fisher_diagonal_kernel, CONFIGS),
        (token_fisher_diagonal_kernel, TOKEN_CONFIGS),
    ):
        for name, signal, inputs, constants, options in forms(configs):
            yield specialise(
                f"{kernel.__name__} {name}",
                kernel,
                {
                    "delta_ptr": f"*{signal}",
                    "act_ptr": f"*{inputs}",
                    "offsets_ptr": "*i64",
                    "out_ptr": "*fp32",
                    "alpha": "fp32",
                },
                {"stride_dc": 1, "stride_ak": 1, **constants},
                options,
                matrix_units=name != "ieee",
            )
