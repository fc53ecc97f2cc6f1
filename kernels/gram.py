"""Inner products of per-sample gradients, ``K[i,j] = <g_i, g_j>``, neither Gram factor stored.

FLOPs: n^2 (C + D), half of the square; bytes: delta and act once per row of tiles (L2), K once.
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

# Square tiles (the result is symmetric) with two accumulators: BLOCK_I samples a side, BLOCK_R of
# the summed axis at a time. Short samples: BLOCK_T tokens a side.
CONFIGS = {
    "ieee": {"BLOCK_I": 64, "BLOCK_R": 16, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BLOCK_I": 64, "BLOCK_R": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_I": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3},
    "bf16": {"BLOCK_I": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3},
    "half": {"BLOCK_I": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
}
TOKEN_CONFIGS = {
    "ieee": {"BLOCK_T": 16, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    "tf32x3": {"BLOCK_T": 64, "BLOCK_R": 16, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_T": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3},
    "bf16": {"BLOCK_T": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3},
    "half": {"BLOCK_T": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
}


@triton.jit
def rows_dot(
    x_ptr,
    i,
    j,
    mask_i,
    mask_j,
    R,
    stride_xn,
    stride_xr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``sum_r x[i,r] x[j,r]`` for rows i [BLOCK] and j [BLOCK] of x_ptr [N, R]: [BLOCK, BLOCK].

    R and the rows are padded with zeros to multiples of 8.
    """
    R, stride_xn = eights(R), eights(stride_xn)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask_r = r < R
        r = r.to(tl.int64)
        left = tl.load(
            x_ptr + i[:, None] * stride_xn + r[None, :] * stride_xr,
            mask=mask_i[:, None] & mask_r[None, :],
            other=0.0,
        )
        right = tl.load(
            x_ptr + j[None, :] * stride_xn + r[:, None] * stride_xr,
            mask=mask_j[None, :] & mask_r[:, None],
            other=0.0,
        )
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision=INPUT_PRECISION)
    return total


@triton.jit
def gram_kernel(
    delta_ptr,
    act_ptr,
    out_ptr,
    N,
    C,
    d,
    stride_dn,
    stride_dc,
    stride_an,
    stride_ak,
    stride_on,
    HAS_BIAS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a tile of ``K[i,j] = (delta_i . delta_j)(a~_i . a~_j)`` and its mirror image.

    Only i >= j is computed, so K is symmetric to the last bit. a~_i . a~_j = act_i . act_j + 1
    with a bias.

    delta_ptr [N, C]; act_ptr [N, d]; out_ptr [N, N] float32.
    """
    if tl.program_id(1) > tl.program_id(0):
        return
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i, mask_j = i < N, j < N
    i, j = i.to(tl.int64), j.to(tl.int64)
    k = rows_dot(
        act_ptr, i, j, mask_i, mask_j, d, stride_an, stride_ak, BLOCK_I, BLOCK_R, DOT,
        INPUT_PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        k += 1.0
    k *= rows_dot(
        delta_ptr, i, j, mask_i, mask_j, C, stride_dn, stride_dc, BLOCK_I, BLOCK_R, DOT,
        INPUT_PRECISION,
    )  # fmt: skip
    lower = mask_i[:, None] & mask_j[None, :] & (i[:, None] >= j[None, :])
    tl.store(out_ptr + i[:, None] * stride_on + j[None, :], k, mask=lower)
    tl.store(out_ptr + j[None, :] * stride_on + i[:, None], k, mask=lower)


@triton.jit
def token_gram_kernel(
    delta_ptr,
    act_ptr,
    offsets_ptr,
    out_ptr,
    n,
    C,
    d,
    stride_dn,
    stride_dc,
    stride_an,
    stride_ak,
    stride_on,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: ``K[i,j] = sum_{s of i, t of j} (delta_s . delta_t)(a~_s . a~_t)`` for i >= j.

    delta_ptr [N, C]; act_ptr [N, d]; offsets_ptr [n+1] int64; out_ptr [n, n] float32.
    """
    i, j = tl.program_id(0) // n, tl.program_id(0) % n
    if j > i:
        return
    i, j = i.to(tl.int64), j.to(tl.int64)
    stop_i, start_j = tl.load(offsets_ptr + i + 1), tl.load(offsets_ptr + j)
    stop_j = tl.load(offsets_ptr + j + 1)
    total = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start_s in range(tl.load(offsets_ptr + i), stop_i, BLOCK_T):
        s = start_s + tl.arange(0, BLOCK_T)
        mask_s = s < stop_i
        for start_t in range(start_j, stop_j, BLOCK_T):
            t = start_t + tl.arange(0, BLOCK_T)
            mask_t = t < stop_j
            k = rows_dot(
                act_ptr, s, t, mask_s, mask_t, d, stride_an, stride_ak, BLOCK_T, BLOCK_R, DOT,
                INPUT_PRECISION,
            )  # fmt: skip
            if HAS_BIAS:
                k += 1.0
            total += k * rows_dot(
                delta_ptr, s, t, mask_s, mask_t, C, stride_dn, stride_dc, BLOCK_T, BLOCK_R, DOT,
                INPUT_PRECISION,
            )  # fmt: skip
    k_ij = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(out_ptr + i * stride_on + j, k_ij)
    tl.store(out_ptr + j * stride_on + i, k_ij)


def gram(
    delta: torch.Tensor,
    act: torch.Tensor,
    offsets: torch.Tensor | None,
    has_bias: bool,
    precision: str = "ieee",
) -> torch.Tensor:
    """K [n, n] float32; delta [N, C], act [N, d]; offsets [n+1], or None: a token per sample."""
    made = dots(precision, delta.dtype, act.dtype)
    delta, act = aligned(delta), aligned(act)
    (N, C), d = delta.shape, act.shape[1]
    n = N if offsets is None else len(offsets) - 1
    out = torch.empty(n, n, dtype=torch.float32, device=delta.device)
    sizes = (C, d, *delta.stride(), *act.stride(), n)
    config = (CONFIGS if offsets is None else TOKEN_CONFIGS)[made.kind]
    constants = {"HAS_BIAS": has_bias, **made.constants, **config}
    if offsets is None:
        tiles = triton.cdiv(n, config["BLOCK_I"])
        gram_kernel[(tiles, tiles)](delta, act, out, N, *sizes, **constants)
    else:
        offsets = offsets.to(delta.device)
        token_gram_kernel[(n * n,)](delta, act, offsets, out, n, *sizes, **constants)
    return out


def specialisations() -> Iterator[Specialisation]:
    """Every configuration of both kernels, with a bias."""
    for kernel, configs in ((gram_kernel, CONFIGS), (token_gram_kernel, TOKEN_CONFIGS)):
        for name, signal, inputs, constants, options in forms(configs):
            yield specialise(
                f"{kernel.__name__} {name}",
                kernel,
                {
                    "delta_ptr": f"*{signal}",
                    "act_ptr": f"*{inputs}",
                    "offsets_ptr": "*i64",
                    "out_ptr": "*fp32",
                },
                {"stride_dc": 1, "stride_ak": 1, "HAS_BIAS": True, **constants},
                options,
                matrix_units=name != "ieee",
            )
